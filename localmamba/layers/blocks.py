"""Blocks: residual addition with stochastic depth, norm, mixer.

A block adds the previous block's output to the residual stream. Drop path therefore acts on the
previous block's output, at that block's rate; the caller applies the last one.
"""

from collections.abc import Sequence
from typing import Any

import timm.layers
import torch
from torch import Tensor, nn

from ..ops import residual_norm
from .fusion import is_plain
from .local_vim_mixer import LocalVimMixer
from .mixer import CROSS, LOCAL
from .norm import LayerNorm, RMSNorm
from .ss2d import SS2D

torch.fx.wrap("residual_norm")


class DropPath(timm.layers.DropPath):
    """timm's stochastic depth, which can also return its factors for a fused op to apply.

    Args:
        drop_prob: Rate at which an image is dropped.
        scale_by_keep: Whether kept images are scaled, so that the mean stays.
    """

    def factors(self, like: Tensor) -> Tensor | None:
        """Draws a factor for each image; `self(x)` is x times such factors.

        Args:
            like: A tensor [B, ...] that gives the factors' device and dtype.

        Returns:
            [B]; None where nothing is dropped, as in evaluation.
        """
        if self.drop_prob == 0.0 or not self.training:
            return None
        keep = 1.0 - self.drop_prob
        drawn = like.new_empty(like.shape[0]).bernoulli_(keep)
        return drawn.div_(keep) if keep > 0.0 and self.scale_by_keep else drawn


class _Block(nn.Module):
    """Base of the blocks: adds to the residual stream and normalizes it, in one op.

    Args:
        norm: An RMSNorm or LayerNorm.
        mixer: Mixes the normalized tokens.
        drop_path: Rate at which the incoming hidden tokens are dropped, by image.
    """

    def __init__(self, norm: RMSNorm | LayerNorm, mixer: nn.Module, drop_path: float):
        super().__init__()
        self.drop_path = DropPath(drop_path)
        self.norm = norm
        self.mixer = mixer

    def _add_norm(
        self, hidden: Tensor, residual: Tensor | None, cos: Tensor | None, sin: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Normalized tokens, and the new stream: residual + drop_path(hidden), rotated."""
        scale: Tensor | None = None
        if residual is not None:
            if torch.jit.is_scripting() or self._drop_is_plain():
                scale = self.drop_path.factors(residual)
            else:
                hidden = self.drop_path(hidden)
        # Rotation is linear: rotating the sum is the release's rotation of both its parts.
        if torch.jit.is_scripting() or self._norm_is_plain():
            norm = self.norm
            return residual_norm(
                hidden, residual, norm.weight, norm.bias, cos, sin, scale, norm.eps
            )
        ones = hidden.new_ones(hidden.shape[-1])
        _, stream = residual_norm(hidden, residual, ones, None, cos, sin, scale)
        return self.norm(stream), stream

    @torch.jit.unused
    def _drop_is_plain(self) -> bool:
        return is_plain(self.drop_path, DropPath)

    @torch.jit.unused
    def _norm_is_plain(self) -> bool:
        return is_plain(self.norm, RMSNorm) or is_plain(self.norm, LayerNorm)


class LocalVimBlock(_Block):
    """residual = residual + droppath(hidden); hidden = mixer(RMSNorm(residual)).

    The residual stream is float32 (float64 for a float64 model) whatever the dtype of the mixer.

    Args:
        dim: Width C.
        directions: Scan directions of the mixer.
        scattn: SCAttn of the mixer, see `LocalVimMixer`.
        class_token: Whether a class token stands in the middle of the sequence.
        merge: How the mixer combines directions, `sum` or `mean`.
        expand: Inner channels over C.
        d_state: States per channel.
        drop_path: Rate at which the incoming hidden tokens are dropped, by image.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
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
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        mixer = LocalVimMixer(dim, directions, scattn, class_token, merge, expand, d_state, **dd)
        super().__init__(RMSNorm(dim, **dd), mixer, drop_path)

    def forward(
        self,
        hidden: Tensor,
        residual: Tensor | None,
        height: int,
        width: int,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Advances the residual stream by one block.

        Args:
            hidden: Output of the previous block, [B, L, C].
            residual: Stream that it is added to, [B, L, C]; None for the first block.
            height: Rows of the grid.
            width: Columns of the grid.
            cos: Rotary table, [1, L, C], or None.
            sin: Rotary table, [1, L, C], or None.

        Returns:
            The mixer's output and the stream that it is to be added to, both [B, L, C].
        """
        normed, stream = self._add_norm(hidden, residual, cos, sin)
        return self.mixer(normed, height, width), stream


class LocalVMambaBlock(_Block):
    """residual = residual + droppath(hidden); hidden = SS2D(LayerNorm(residual)).

    The residual stream is float32 (float64 for a float64 model) whatever the dtype of the mixer.

    Args:
        dim: Width C.
        directions: Scan directions of the mixer.
        scattn: SCAttn of the mixer, see `SS2D`.
        expand: Inner channels over C.
        d_state: States per channel.
        drop_path: Rate at which the incoming hidden tokens are dropped, by image.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        directions: Sequence[str] = CROSS,
        scattn: str | None = "channel",
        expand: float = 2.0,
        d_state: int = 16,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        mixer = SS2D(dim, directions, scattn, expand, d_state, **dd)
        super().__init__(LayerNorm(dim, **dd), mixer, drop_path)

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Advances the residual stream by one block.

        Args:
            hidden: Output of the previous block, [B, H, W, C].
            residual: Stream that it is added to, [B, H, W, C]; None for the first block.

        Returns:
            The mixer's output and the stream that it is to be added to, both [B, H, W, C].
        """
        normed, stream = self._add_norm(hidden, residual, None, None)
        return self.mixer(normed), stream
