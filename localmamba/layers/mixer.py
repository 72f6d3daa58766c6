"""Base of the mixers: S6 branches along several directions, and SCAttn."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import check_directions, scan_index
from .precision import saturate
from .s6 import S6Branches
from .scattn import SCAttn

for _name in ("scan_index", "saturate"):
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


class DirectionalMixer(nn.Module):
    """Base of the mixers: K S6 branches, each along its own direction, whose outputs are combined.

    Args:
        dim: Width C of the tokens.
        directions: Names of the K scan directions.
        scattn: `channel`, `channel+spatial`, or `none` to add the directions as they are. None is
            `none`; `timm.create_model` drops arguments that are None.
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
        self.attn = None if scattn in (None, "none") else SCAttn(inner, scattn, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)

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

    def _scan(self, x: Tensor, height: int, width: int, class_token: int) -> Tensor:
        """Scans tokens [B, L, D] along every direction, [B, K, L, D]."""
        index = scan_index(x, self.directions, height, width, class_token)
        return saturate(self.branches(x, index))
