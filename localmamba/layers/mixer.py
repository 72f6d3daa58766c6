"""What the mixers share: S6 branches along several directions, SCAttn, and how they are joined."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import check_directions
from .s6 import S6Branches
from .scattn import SCAttn


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
    """Base of the mixers: tokens pass K S6 branches, each along its own direction, and are joined.

    A mixer with `search` is a supernet's: its branches are joined with weights softmax(`alpha`)
    after a LayerNorm each (paper section 4.2). For what is sampled from a supernet, `forward` of
    the mixers takes `branches`, the positions in `directions` that run (the others cost nothing),
    and `weights`, what they are added with in place of softmax(`alpha`) over those branches.

    Args:
        dim: Width C of the tokens.
        directions: Names of the K scan directions.
        scattn: `channel`, `channel+spatial`, or None to add the directions as they are.
        search: Whether the directions are weighed by `alpha`.
        expand: Inner channels D = expand * dim.
        d_state: States per channel N.
        dt_rank: Rank of the step sizes; ceil(dim / 16) if None.
        conv_width: Taps of the convolution along each direction, 0 for none.
        device: Where the parameters live.
        dtype: Of the parameters.

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
        dd = {"device": device, "dtype": dtype}
        inner = int(expand * dim)
        self.dim = dim
        self.inner_dim = inner
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
        self.attn = None if scattn is None else SCAttn(inner, scattn, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.alpha = None
        if search:
            self.alpha = nn.Parameter(torch.empty(len(self.directions), **dd))
            nn.init.normal_(self.alpha, std=1e-3)

    def extra_repr(self) -> str:
        return ", ".join(self.directions)

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
        alpha = self.alpha
        if alpha is None:
            return None
        if branches is not None:
            alpha = alpha[torch.tensor(branches, device=alpha.device)]
        return torch.softmax(alpha, 0)
