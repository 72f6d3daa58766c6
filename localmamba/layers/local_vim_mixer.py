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
            dim, directions, scattn, expand, d_state, dt_rank, conv_width, device, dtype
        )
        if merge not in MERGES:
            raise ValueError(f"merge must be one of {', '.join(MERGES)}, got {merge!r}")
        self.class_token = class_token
        self.scale = 1.0 / len(self.directions) if merge == "mean" else 1.0

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Mixes the tokens of a grid.

        Args:
            x: Tokens row by row, [B, H * W, C], or [B, H * W + 1, C] with a class token.
            height: Rows H of the grid.
            width: Columns W of the grid.

        Returns:
            The shape of x.

        Raises:
            ValueError: If the tokens do not fit the grid or the width.
        """
        class_token = height * width // 2 if self.class_token else -1
        x = check_tokens(x, height, width, class_token, self.dim)
        x, z = saturate(self.in_proj(x)).chunk(2, dim=-1)
        out = self._mix_directions(x, z, height, width, class_token)
        if self.scale != 1.0:
            out = out * self.scale
        return saturate(self.out_proj(saturate(out)))

    def _mix_directions(
        self, x: Tensor, z: Tensor, height: int, width: int, class_token: int
    ) -> Tensor:
        """Scans tokens [B, L, D] and combines the directions; overridden by supernets."""
        return self._combine(self._scan(x, height, width, class_token), z)

    def _combine(self, y: Tensor, z: Tensor) -> Tensor:
        """Gates the outputs of the directions and adds them: [B, K, L, D] -> [B, L, D]."""
        if self.attn is None:
            return combine_directions(y, None, None, z)
        return self.attn.combine(y, z, gate_first=True)
