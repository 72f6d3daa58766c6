"""LocalVim's mixer: Mamba's block with several directions (paper section 4.1, figure 3a)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import combine_directions
from .mixer import LOCAL, DirectionalMixer, check_tokens
from .precision import saturate

for _name in ("combine_directions", "check_tokens", "saturate"):
    torch.fx.wrap(_name)

MERGES = ("sum", "mean")


class LocalVimMixer(DirectionalMixer):
    """Mixes tokens along several scan directions, each with a causal convolution of its own.

    Args:
        dim: Width C of the tokens.
        directions: Names of the scan directions, see `localmamba.ops.list_directions()`.
        scattn: `channel` (the release), `channel+spatial` (the paper), or None.
        search: Whether this is a supernet's mixer, see `DirectionalMixer`.
        class_token: Whether a class token stands in the middle of the sequence, at position
            H * W // 2. Every direction reads it at that same step.
        merge: `sum`, or `mean` (the later Vim), of the directions.
        expand: Inner channels D = expand * dim.
        d_state: States per channel N.
        dt_rank: Rank of the step sizes; ceil(dim / 16) if None.
        conv_width: Taps of the causal convolution along each direction.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If a direction, `scattn` or `merge` is unknown.

    Example:
        >>> mixer = LocalVimMixer(64, directions=["h", "h_flip", "w2", "w2_flip"])
        >>> tokens = torch.randn(2, 10 * 15, 64)
        >>> mixer(tokens, 10, 15).shape
        torch.Size([2, 150, 64])
    """

    def __init__(
        self,
        dim: int,
        directions: Sequence[str] = LOCAL,
        scattn: str | None = "channel",
        search: bool = False,
        class_token: bool = False,
        merge: str = "sum",
        expand: float = 2.0,
        d_state: int = 16,
        dt_rank: int | None = None,
        conv_width: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            dim, directions, scattn, search, expand, d_state, dt_rank, conv_width, device, dtype
        )
        if merge not in MERGES:
            raise ValueError(f"merge must be one of {', '.join(MERGES)}, got {merge!r}")
        self.class_token = class_token
        self.scale = 1.0 / len(self.directions) if merge == "mean" else 1.0

    def forward(
        self,
        x: Tensor,
        height: int,
        width: int,
        branches: list[int] | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Mixes the tokens of a grid.

        Args:
            x: Tokens row by row, [B, H * W, C], or [B, H * W + 1, C] with a class token.
            height: Rows H of the grid.
            width: Columns W of the grid.
            branches: Positions in `directions` that run; None for all.
            weights: What these are added with, [K], as in a supernet; see `DirectionalMixer`.

        Returns:
            The shape of x.

        Raises:
            ValueError: If the tokens do not fit the grid or the width.
        """
        class_token = height * width // 2 if self.class_token else -1
        x = check_tokens(x, height, width, class_token, self.dim)
        x, z = saturate(self.in_proj(x)).chunk(2, dim=-1)
        weights = self._sum_weights(branches, weights)
        if weights is None:
            y = self._scan(x, height, width, class_token, branches)
            if self.attn is None:
                out = combine_directions(y, None, None, z)
            else:
                out = self.attn.combine(y, z, gate_first=True)
        else:
            out = self._mix(x, z, height, width, class_token, branches, weights)
        if self.scale != 1.0:
            out = out * self.scale
        return saturate(self.out_proj(saturate(out)))
