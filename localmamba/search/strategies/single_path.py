"""Uniform sampling of paths, then evolution over choices of directions (SPOS)."""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..evolution import Sets, Space, evolve
from ..strategy import SearchSettings, Strategy, register_strategy, sample_sets

_SURVIVORS = 10
"""Number of best choices whose directions make up the final probabilities."""


@register_strategy("single_path")
class SinglePath(Strategy):
    """Trains `keep` directions of each layer at a time, drawn uniformly; evolution then chooses.

    Guo et al., "Single Path One-Shot Neural Architecture Search with Uniform Sampling", ECCV 2020
    (https://arxiv.org/abs/1904.00420). There is no alpha: a path of the supernet is the final
    model itself, its branches added without weights. Sets of `keep` directions are drawn and
    evolved, so that a direction is evaluated together with others. Until the evolution,
    probabilities are estimated from the training losses: softmax of how much smaller the loss was,
    in its standard deviations, when a direction took part.
    """

    uses_holdout = True
    weighted = False
    fixed_paths = False

    def __init__(self, model: nn.Module, settings: SearchSettings, seed: int):
        super().__init__(model, settings, seed)
        self._uniform = torch.zeros(len(self.mixers), len(self.candidates))
        self._estimate = self._uniform
        self._drawn: list[list[list[int]]] = []
        self._losses: list[Tensor] = []

    def start_weight_pass(self) -> None:
        drawn = sample_sets(self._uniform, self.settings.keep, self.generator)
        self._drawn.append(drawn)
        self.sample(drawn)

    def start_evaluation(self) -> None:
        self.sample(self.kept_branches())

    def record(self, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def end_epoch(self) -> None:
        if len(self._losses) > 1:
            self._estimate = (self._estimate + self._gain()) / 2
        self._drawn, self._losses = [], []

    def probabilities(self) -> Tensor:
        return torch.softmax(self._estimate, dim=1)

    def _gain(self) -> Tensor:
        """Returns by how many standard deviations each direction lowered the loss, [layers, C]."""
        losses = torch.stack([loss.float().cpu() for loss in self._losses])
        score = -(losses - losses.mean()) / losses.std().clamp(min=1e-12)
        drawn = torch.tensor(self._drawn[: len(losses)])  # [steps, layers, keep]
        took_part = torch.zeros(len(losses), *self._uniform.shape).scatter_(2, drawn, 1.0)
        total = torch.einsum("slc,s->lc", took_part, score)
        return total / took_part.sum(0).clamp(min=1)

    def conclude(self, held_out_loss: Callable[[], float]) -> Tensor:
        def loss_of(choice: Sets) -> float:
            self.sample(choice)
            return held_out_loss()

        space = Space(len(self.mixers), len(self.candidates), self.settings.keep)
        ranked = evolve(
            loss_of,
            space,
            random.Random(self.seed),
            self.settings.population,
            self.settings.generations,
        )
        return self._shares(ranked)

    def _shares(self, ranked: list[Sets]) -> Tensor:
        """Returns the shares of the directions among the best choices, [layers, C].

        The very best choice counts more than all the others together, so that the likeliest
        directions of each layer are its own.
        """
        survivors = ranked[:_SURVIVORS]
        shares = torch.zeros(self._uniform.shape)
        for rank, choice in enumerate(survivors):
            for layer, genes in enumerate(choice):
                shares[layer, list(genes)] += len(survivors) if rank == 0 else 1
        return shares / shares.sum(1, keepdim=True)

    def state_dict(self) -> dict[str, Any]:
        epoch = {"drawn": list(self._drawn), "losses": [loss.cpu() for loss in self._losses]}
        return {**super().state_dict(), "estimate": self._estimate, **epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._estimate = state["estimate"].cpu()
        self._drawn, self._losses = list(state["drawn"]), list(state["losses"])
