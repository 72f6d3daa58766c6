"""Base of the mixers: S6 branches along several directions, and SCAttn."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import checkpoint
from torch import Tensor, nn

from ..ops import check_directions, scan_index
from .precision import saturate
from .s6 import S6Branches
from .scattn import SCAttn

for _name in ("scan_index", "mix_branches", "check_tokens", "saturate"):
    torch.fx.wrap(_name)

LOCAL = ("h", "h_flip", "w2", "w2_flip")
"""Directions of every block of the paper's LocalVim* (without search)."""

CROSS = ("h", "v", "h_flip", "v_flip")
"""Directions of VMamba's cross scan."""


def check_tokens(x: Tensor, height: int, width: int, class_token: int, dim: int) -> Tensor:
    """Returns the tokens; raises ValueError if they are not [B, L, dim], L that of the grid."""
    tokens = height * width + (1 if class_token >= 0 else 0)
    if x.dim() != 3 or x.shape[1] != tokens or x.shape[2] != dim:
        extra = " and a class token" if class_token >= 0 else ""
        raise ValueError(
            f"tokens of a {height} x {width} grid{extra} must be [B, {tokens}, {dim}], "
            f"got {x.shape}"
        )
    return x


def mix_branches(
    y: Tensor,
    weights: Tensor,
    channel_weights: Tensor | None = None,
    token_weights: Tensor | None = None,
    z: Tensor | None = None,
) -> Tensor:
    """The supernet's sum: branches are gated and weighed, normalised without affine, then added.

    Args:
        y: Outputs of the directions, [B, K, L, D].
        weights: Of the sum, [K].
        channel_weights: From SCAttn, [B, K, D].
        token_weights: From SCAttn, [B, K, L].
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


class DirectionalMixer(nn.Module):
    """Base of the mixers: K S6 branches, each along its own direction, whose outputs are combined.

    A mixer with `search` is a supernet's: its branches are joined with weights softmax(`alpha`)
    after a LayerNorm each (paper section 4.2). For what is sampled from a supernet, `forward` of
    the mixers takes `branches`, the positions in `directions` that run (the others cost nothing),
    and `weights`, what they are added with in place of softmax(`alpha`) over those branches.

    Attributes:
        alpha: Logits of the directions in a supernet, [K]; None elsewhere.
        passed_dim: Inner channels that pass the directions: all, until `narrow`.
        at_once: With many candidates a supernet can run so many directions at a time, and again in
            the backward pass, instead of keeping what all of them compute; 0 for all at once.

    Args:
        dim: Width C of the tokens.
        directions: Names of the K scan directions.
        scattn: `channel`, `channel+spatial`, or `none` to add the directions as they are. None is
            `none`; `timm.create_model` drops arguments that are None.
        search: Whether the directions are weighed by `alpha`.
        expand: Inner channels D = expand * dim.
        d_state: States per channel N.
        dt_rank: Rank of the step sizes; ceil(dim / 16) if None.
        conv_width: Taps of the convolution along each direction, 0 for none.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If a direction or `scattn` is unknown.
    """

    def __init__(
        self,
        dim: int,
        directions: Sequence[str],
        scattn: str | None,
        search: bool,
        expand: float,
        d_state: int,
        dt_rank: int | None,
        conv_width: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = int(expand * dim)
        self.dim = dim
        self.inner_dim = self.passed_dim = inner
        self.at_once = 0
        self.directions = check_directions(directions)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.branches = S6Branches(
            len(self.directions),
            inner,
            d_state,
            math.ceil(dim / 16) if dt_rank is None else dt_rank,
            conv_width,
            **dd,
        )
        self.attn = None if scattn in (None, "none") else SCAttn(inner, scattn, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.alpha = None
        if search:
            self.alpha = nn.Parameter(torch.empty(len(self.directions), **dd))
            nn.init.normal_(self.alpha, std=1e-3)

    def extra_repr(self) -> str:
        return ", ".join(self.directions)

    def get_extra_state(self) -> Tensor:
        """The directions' names in UTF-8, as a tensor, which safetensors can store."""
        text = " ".join(self.directions).encode()
        return torch.tensor(list(text), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Checks that weights are for this mixer's directions.

        Raises:
            ValueError: If they are for others.
        """
        if state.is_meta:
            return
        names = bytes(state.to(torch.uint8).tolist()).decode(errors="replace").split(" ")
        if names != self.directions:
            raise ValueError(
                f"the weights are for the directions {', '.join(names)}, "
                f"this layer has {', '.join(self.directions)}"
            )

    def narrow(self, share: int) -> None:
        """Sends one in `share` inner channels of a supernet's mixer through the directions.

        The others go round them (PC-DARTS). The directions' parameters are made anew.

        Args:
            share: A divisor of the inner channels.

        Raises:
            ValueError: If it is not one, or this is no supernet's mixer.
        """
        if self.alpha is None or self.inner_dim % share:
            raise ValueError(f"only a supernet's {self.inner_dim} channels divide by {share}")
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

    def _names(self, branches: list[int] | None) -> list[str]:
        if branches is None:
            return self.directions
        return [self.directions[k] for k in branches]

    def _sum_weights(
        self,
        branches: list[int] | None,
        weights: Tensor | None,
    ) -> Tensor | None:
        """What the branches that ran are added with, [K]; None where they are simply added."""
        if weights is not None:
            return weights
        alpha: Tensor | None = self.alpha
        if alpha is None:
            return None
        if branches is not None:
            alpha = alpha[torch.tensor(branches, device=alpha.device)]
        return torch.softmax(alpha, 0)

    def _scan(
        self,
        x: Tensor,
        height: int,
        width: int,
        class_token: int,
        branches: list[int] | None,
    ) -> Tensor:
        """Outputs of the branches, [B, K, L, D]."""
        index = scan_index(x, self._names(branches), height, width, class_token)
        return saturate(self.branches(x, index, branches))

    def _mix(
        self,
        x: Tensor,
        z: Tensor | None,
        height: int,
        width: int,
        class_token: int,
        branches: list[int] | None,
        weights: Tensor,
    ) -> Tensor:
        """The supernet's sum of the branches, each gated by z if given, [B, L, D]."""
        passed = self.passed_dim
        part = x[..., :passed]
        gate = None if z is None else z[..., :passed]
        grid = (height, width, class_token)
        if self.at_once > 0 and not torch.jit.is_scripting():
            out = self._mix_groups(part, gate, grid, branches, weights)
        else:
            out = self._mix_all(part, gate, grid, branches, weights)
        if passed == self.inner_dim:
            return out
        rest = x[..., passed:]
        return torch.cat((out, rest if z is None else rest * F.silu(z[..., passed:])), dim=-1)

    def _mix_all(
        self,
        x: Tensor,
        z: Tensor | None,
        grid: tuple[int, int, int],
        branches: list[int] | None,
        weights: Tensor,
    ) -> Tensor:
        y = self._scan(x, grid[0], grid[1], grid[2], branches)
        channel: Tensor | None = None
        token: Tensor | None = None
        if self.attn is not None:
            channel, token = self.attn(y, z)
        return mix_branches(y, weights, channel, token, z)

    @torch.jit.ignore
    def _mix_groups(
        self,
        x: Tensor,
        z: Tensor | None,
        grid: tuple[int, int, int],
        branches: list[int] | None,
        weights: Tensor,
    ) -> Tensor:
        """`_mix_all` for a few branches at a time, which are run again in the backward pass."""
        if branches is None:
            branches = list(range(len(self.directions)))
        groups = [branches[i : i + self.at_once] for i in range(0, len(branches), self.at_once)]
        parts = weights.split(self.at_once)
        out = checkpoint(self._mix_all, x, z, grid, groups[0], parts[0])
        for group, part in zip(groups[1:], parts[1:], strict=True):
            out = out + checkpoint(self._mix_all, x, z, grid, group, part)
        return out
