"""Sampled directions with binary gates, which pass a gradient to alpha (ProxylessNAS)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..strategy import AlternatingStrategy, register_strategy, sample_sets


@register_strategy("binary_gates")
class BinaryGates(AlternatingStrategy):
    """Trains a few directions at a time, drawn by alpha; alpha learns from pairs of them.

    Cai et al., "ProxylessNAS", ICLR 2019 (https://arxiv.org/abs/1812.00332), section 3.2. There a
    layer has one path; here it has `keep` of them, drawn without replacement by softmax(alpha).
    For alpha, keep + 1 directions are drawn: the first keep - 1 stay, the last two compete for the
    last place. One of them, drawn by their relative probability, has its gate open; the gradient
    of both gates reaches their alphas (paper, equation 4, restricted to the pair), and afterwards
    both alphas are moved alike so that no other direction's probability changes. With keep = 1
    this is the paper's method.

    Branches are added with weights gate / keep, after the LayerNorm of a supernet's branches.
    """

    fixed_paths = False
    betas = (0.0, 0.999)  # no momentum: directions that are not drawn must not move

    def start_weight_pass(self) -> None:
        self._open(sample_sets(self.alpha_table(), self.settings.keep, self.generator))

    def start_evaluation(self) -> None:
        self._open(self.kept_branches())

    def _open(self, branches: list[list[int]]) -> None:
        gates = torch.full((self.settings.keep,), 1 / self.settings.keep)
        self.sample(branches, [gates.to(alpha.device) for alpha in self.alphas])

    def start_choice_pass(self, progress: float) -> list[Tensor]:
        if progress < self.settings.choice_warmup or self.settings.keep == len(self.candidates):
            return []
        table = self.alpha_table()
        keep = self.settings.keep
        drawn = torch.tensor(sample_sets(table, keep + 1, self.generator))
        self._rivals = drawn[:, keep - 1 :]  # [layers, 2]
        self._odds = torch.softmax(table.gather(1, self._rivals), dim=1)
        coin = torch.rand(len(table), generator=self.generator)
        loser = torch.where(coin < self._odds[:, 0], 1, 0)
        gates = torch.full(drawn.shape, 1 / keep)
        gates[torch.arange(len(table)), keep - 1 + loser] = 0.0
        weights = [
            row.to(alpha.device).requires_grad_()
            for row, alpha in zip(gates, self.alphas, strict=True)
        ]
        self.sample(drawn.tolist(), weights)
        return weights

    def finish_choice_pass(self, gradients: Sequence[Tensor]) -> None:
        keep = self.settings.keep
        # An open gate has the weight 1 / keep: the chain rule through it.
        gate_grad = torch.stack([g[keep - 1 :].float().cpu() for g in gradients]) / keep
        mean = (self._odds * gate_grad).sum(1, keepdim=True)
        rival_grad = self._odds * (gate_grad - mean)  # sum_j dL/dg_j p_j (delta_ij - p_i)
        before = self.alpha_table()
        full = torch.zeros_like(before).scatter_(1, self._rivals, rival_grad)
        self.step([g.to(a.device) for g, a in zip(full, self.alphas, strict=True)])
        self._keep_mass(before)

    @torch.no_grad()
    def _keep_mass(self, before: Tensor) -> None:
        """Moves both rivals alike until their joint probability is what it was."""
        after = self.alpha_table()
        mass = [table.gather(1, self._rivals).logsumexp(1) for table in (before, after)]
        for layer, alpha in enumerate(self.alphas):
            alpha[self._rivals[layer].to(alpha.device)] += (mass[0] - mass[1])[layer].item()
