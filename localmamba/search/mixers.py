"""The mixers of a supernet, and the sum of their branches (paper, section 4.2)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import checkpoint
from torch import Tensor, nn
from torch.func import functional_call

from ..layers import SS2D, DirectionalMixer, LocalVimMixer, S6Branches, SCAttn
from ..layers.precision import saturate
from ..ops import scan_index

for _name in ("scan_index", "saturate", "combine_normalized"):
    torch.fx.wrap(_name)


def combine_normalized(
    y: Tensor,
    weights: Tensor,
    channel_weights: Tensor | None = None,
    token_weights: Tensor | None = None,
    z: Tensor | None = None,
) -> Tensor:
    """Weighted sum of the branches, each after its gate, SCAttn and a LayerNorm without affine.

    Args:
        y: Outputs of the branches, [B, K, L, D].
        weights: [K].
        channel_weights: SCAttn's weights by channel, [B, K, D].
        token_weights: SCAttn's weights by token, [B, K, L].
        z: Gate, [B, L, D].

    Returns:
        [B, L, D].
    """
    if z is not None:
        y = y * F.silu(z)[:, None]
    if channel_weights is not None:
        y = y * channel_weights[:, :, None]
    if token_weights is not None:
        y = y * token_weights[..., None]
    y = F.layer_norm(y, y.shape[-1:])
    return torch.einsum("bkld,k->bld", y, weights.to(y.dtype))


class SupernetMixer(DirectionalMixer):
    """Base of the mixers of a supernet, whose directions are the candidates of a search.

    With `alpha`, the branches are added by `combine_normalized` with weights softmax(alpha);
    without, they are combined as in the plain mixer. `sample` restricts both to some branches.
    `make_supernet` turns a plain mixer into one of these; its parameters keep their names.

    Attributes:
        alpha: Logits of the candidates, [C]; None for a sum without weights.
        sampled: Positions in `directions` of the branches that run; None for all.
        weights: Weights of the branches that run, [K]; None for softmax(alpha) over them.
        passed_dim: Inner channels that pass through the branches.
        chunk_size: Branches computed at a time, and recomputed in the backward pass, to save
            memory; 0 for all. It has an effect where branches are added with weights.
    """

    def become_supernet(self) -> None:
        """Initializes the attributes above on what was constructed as a plain mixer."""
        self.sampled: list[int] | None = None
        self.weights: Tensor | None = None
        self.passed_dim = self.inner_dim
        self.chunk_size = 0
        self.alpha: nn.Parameter | None = None

    def set_weighted(self, weighted: bool) -> None:
        """Gives the mixer an `alpha` where it has none, or takes it away."""
        if not weighted:
            self.alpha = None
        elif self.alpha is None:
            like = self.in_proj.weight
            alpha = torch.empty(len(self.directions), device=like.device, dtype=like.dtype)
            self.alpha = nn.Parameter(nn.init.normal_(alpha, std=1e-3))

    def sample(self, branches: Sequence[int] | None, weights: Tensor | None = None) -> None:
        """Sets the branches that run from now on; the others cost nothing.

        Call it between steps: a backward pass that recomputes must find what the forward had.

        Args:
            branches: Positions in `directions`; None for all.
            weights: Weights of these branches, [K]; None for softmax(alpha) over them.
        """
        self.sampled = None if branches is None else list(branches)
        self.weights = weights

    def partial_channels(self, share: int) -> None:
        """Passes one in `share` inner channels through the branches, the others around them.

        The parameters of the branches and of SCAttn are made anew.

        Args:
            share: A divisor of the inner channels.

        Raises:
            ValueError: If it is not one, or the mixer has no `alpha`.
        """
        if self.alpha is None or self.inner_dim % share:
            raise ValueError(
                f"{self.inner_dim} channels of a mixer with alpha must divide by {share}"
            )
        old, attn = self.branches, self.attn
        dd: dict[str, Any] = {"device": old.D.device, "dtype": old.D.dtype}
        taps = 0 if old.conv_weight is None else old.conv_weight.shape[2]
        self.passed_dim = passed = self.inner_dim // share
        self.branches = S6Branches(
            old.num_branches, passed, old.A_log.shape[2], old.dt_weight.shape[2], taps, **dd
        )
        if attn is not None:
            kind = "channel" if attn.local_reduce is None else "channel+spatial"
            self.attn = SCAttn(passed, kind, **dd)

    def _branch_weights(self) -> Tensor | None:
        """Returns the weights of the branches that run, [K]; None for a sum without weights."""
        if self.weights is not None:
            return self.weights
        alpha: Tensor | None = self.alpha
        if alpha is None:
            return None
        if self.sampled is not None:
            alpha = alpha[torch.tensor(self.sampled, device=alpha.device)]
        return torch.softmax(alpha, 0)

    def _scan(self, x: Tensor, height: int, width: int, class_token: int) -> Tensor:
        return self._scan_branches(x, (height, width, class_token), self.sampled)

    def _scan_branches(
        self, x: Tensor, grid: tuple[int, int, int], branches: list[int] | None
    ) -> Tensor:
        height, width, class_token = grid
        if branches is None:
            index = scan_index(x, self.directions, height, width, class_token)
            return saturate(self.branches(x, index))
        if torch.jit.is_scripting():
            raise ValueError("a scripted supernet runs all branches: call sample(None) before")
        else:  # noqa: RET506 - TorchScript compiles what follows a bare `if`
            names = [self.directions[k] for k in branches]
            index = scan_index(x, names, height, width, class_token)
            chosen = torch.tensor(branches, device=x.device)
            picked = {name: p[chosen] for name, p in self.branches.named_parameters()}
            return saturate(functional_call(self.branches, picked, (x, index)))

    def _weighted_sum(
        self, x: Tensor, z: Tensor | None, grid: tuple[int, int, int], weights: Tensor
    ) -> Tensor:
        """Adds the branches, each gated by z if given, [B, L, D]."""
        passed = self.passed_dim
        part = x[..., :passed]
        gate = None if z is None else z[..., :passed]
        if self.chunk_size > 0 and not torch.jit.is_scripting():
            out = self._sum_chunks(part, gate, grid, weights)
        else:
            out = self._sum_branches(part, gate, grid, self.sampled, weights)
        if passed == self.inner_dim:
            return out
        rest = x[..., passed:]
        return torch.cat((out, rest if z is None else rest * F.silu(z[..., passed:])), dim=-1)

    def _sum_branches(
        self,
        x: Tensor,
        z: Tensor | None,
        grid: tuple[int, int, int],
        branches: list[int] | None,
        weights: Tensor,
    ) -> Tensor:
        y = self._scan_branches(x, grid, branches)
        channel: Tensor | None = None
        token: Tensor | None = None
        if self.attn is not None:
            channel, token = self.attn(y, z)
        return combine_normalized(y, weights, channel, token, z)

    @torch.jit.ignore
    def _sum_chunks(
        self, x: Tensor, z: Tensor | None, grid: tuple[int, int, int], weights: Tensor
    ) -> Tensor:
        size = self.chunk_size
        branches = list(range(len(self.directions))) if self.sampled is None else self.sampled
        chunks = [branches[i : i + size] for i in range(0, len(branches), size)]
        parts = weights.split(size)
        out = checkpoint(self._sum_branches, x, z, grid, chunks[0], parts[0])
        for chunk, part in zip(chunks[1:], parts[1:], strict=True):
            out = out + checkpoint(self._sum_branches, x, z, grid, chunk, part)
        return out


class SupernetSS2D(SupernetMixer, SS2D):
    """`SS2D` in a supernet of LocalVMamba."""

    def _mix_directions(self, x: Tensor, z: Tensor, height: int, width: int) -> Tensor:
        weights = self._branch_weights()
        if weights is None:
            return self._combine(self._scan(x, height, width, -1), z)
        return self.norm(self._weighted_sum(x, None, (height, width, -1), weights)) * F.silu(z)


class SupernetLocalVimMixer(SupernetMixer, LocalVimMixer):
    """`LocalVimMixer` in a supernet of LocalVim."""

    def _mix_directions(
        self, x: Tensor, z: Tensor, height: int, width: int, class_token: int
    ) -> Tensor:
        weights = self._branch_weights()
        if weights is None:
            return self._combine(self._scan(x, height, width, class_token), z)
        return self._weighted_sum(x, z, (height, width, class_token), weights)


SUPERNET_MIXERS: dict[type[DirectionalMixer], type[SupernetMixer]] = {
    SS2D: SupernetSS2D,
    LocalVimMixer: SupernetLocalVimMixer,
}
"""The class of a supernet's mixer, by that of the plain one."""
