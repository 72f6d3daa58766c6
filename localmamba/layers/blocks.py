"""A mixer with its norm, residual and stochastic depth.

A block adds what the block before put out to the residual stream, so it is there that this is
dropped: a block's rate is that of the block before, and whoever calls the last block drops what it
puts out. The model is the one whose blocks drop their own output.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import residual_norm
from .drop_path import DropPath
from .local_vim_mixer import LocalVimMixer
from .norm import RMSNorm
from .ss2d import SS2D

torch.fx.wrap("residual_norm")


class LocalVimBlock(nn.Module):
    """residual = residual + droppath(hidden); hidden = mixer(RMSNorm(residual)).

    The residual stream is float32 (float64 for a float64 model) whatever the dtype of the mixer.

    Args:
        dim: Width C.
        directions: Scan directions of the mixer.
        scattn: Its SCAttn, see `LocalVimMixer`.
        class_token: Whether a class token stands in the middle of the sequence.
        merge: How the mixer joins directions.
        expand: Inner channels over C.
        d_state: States per channel.
        drop_path: Rate at which the hidden tokens that come in are dropped, by image.
        device: Where the parameters live.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        dim: int,
        directions: Sequence[str] = ("h", "h_flip", "w2", "w2_flip"),
        scattn: str | None = "channel",
        class_token: bool = False,
        merge: str = "sum",
        expand: float = 2.0,
        d_state: int = 16,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.drop_path = DropPath(drop_path)
        self.norm = RMSNorm(dim, **dd)
        self.mixer = LocalVimMixer(
            dim, directions, scattn, class_token, merge, expand, d_state, **dd
        )

    def forward(
        self,
        hidden: Tensor,
        residual: Tensor | None,
        height: int,
        width: int,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One step of the residual stream.

        Args:
            hidden: What the block before put out, [B, L, C].
            residual: The stream before that is added, [B, L, C]; None for the first block.
            height: Rows of the grid.
            width: Columns of the grid.
            cos: Rotary table, [1, L, C], or None.
            sin: Rotary table, [1, L, C], or None.

        Returns:
            The mixer's output and the stream that it is to be added to, both [B, L, C].
        """
        scale = None if residual is None else self.drop_path.factors(residual)
        # Rotation is linear: one turn of the sum is the release's turns of both its parts.
        normed, stream = residual_norm(
            hidden, residual, self.norm.weight, None, cos, sin, scale, self.norm.eps
        )
        return self.mixer(normed, height, width), stream


class LocalVMambaBlock(nn.Module):
    """residual = residual + droppath(hidden); hidden = SS2D(LayerNorm(residual)).

    The residual stream is float32 (float64 for a float64 model) whatever the dtype of the mixer.

    Args:
        dim: Width C.
        directions: Scan directions of the mixer.
        scattn: Its SCAttn, see `SS2D`.
        expand: Inner channels over C.
        d_state: States per channel.
        drop_path: Rate at which the hidden tokens that come in are dropped, by image.
        device: Where the parameters live.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        dim: int,
        directions: Sequence[str] = ("h", "v", "h_flip", "v_flip"),
        scattn: str | None = "channel",
        expand: float = 2.0,
        d_state: int = 16,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.drop_path = DropPath(drop_path)
        self.norm = nn.LayerNorm(dim, **dd)
        self.mixer = SS2D(dim, directions, scattn, expand, d_state, **dd)

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One step of the residual stream.

        Args:
            hidden: What the block before put out, [B, H, W, C].
            residual: The stream before that is added, [B, H, W, C]; None for the first block.

        Returns:
            The mixer's output and the stream that it is to be added to, both [B, H, W, C].
        """
        scale = None if residual is None else self.drop_path.factors(residual)
        weight, bias = self.norm.weight, self.norm.bias
        normed, stream = residual_norm(
            hidden, residual, weight, bias, None, None, scale, self.norm.eps
        )
        return self.mixer(normed), stream
