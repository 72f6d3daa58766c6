"""The release's backbones for dense prediction: feature maps, each through its own LayerNorm."""

import os
from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from .hierarchical import LocalVMamba
from .plain import LocalVim


class DenseBackbone(nn.Module):
    """Feature maps for detection and segmentation, as the released backbones give them.

    Of LocalVMamba, what chosen stages put out; of LocalVim, what the mixers of chosen blocks put
    out (not the residual stream, which `features_only=True` gives). Each through a LayerNorm.

    Args:
        model: A LocalVim or LocalVMamba; its parts that no map needs are removed.
        out_indices: Stages or blocks. By default all stages, or four blocks at equal steps.

    Attributes:
        taken: Positions of the stages or blocks, ascending.

    Raises:
        ValueError: If `model` is of another class, or a position does not exist.

    Example:
        >>> backbone = DenseBackbone(timm.create_model("localvmamba_demo"))
        >>> [list(y.shape) for y in backbone(torch.randn(1, 3, 64, 96))]
        [[1, 32, 32, 48], [1, 64, 16, 24], [1, 128, 8, 12]]
    """

    def __init__(self, model: nn.Module, out_indices: Sequence[int] | None = None):
        super().__init__()
        if not isinstance(model, (LocalVim, LocalVMamba)):
            raise ValueError(
                f"model must be a LocalVim or a LocalVMamba, got {type(model).__name__}"
            )
        levels = len(model.feature_info)
        self.plain = isinstance(model, LocalVim)
        if out_indices is None:
            steps = [levels * step // 4 - 1 for step in (1, 2, 3, 4)]
            out_indices = steps if self.plain else range(levels)
        if not out_indices or not all(-levels <= i < levels for i in out_indices):
            raise ValueError(
                f"out_indices must be between 0 and {levels - 1}, got {list(out_indices)}"
            )
        self.taken = sorted(i % levels for i in out_indices)
        model.prune_intermediate_layers(self.taken, prune_norm=True)
        self.model: LocalVim | LocalVMamba = model
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in self.channels())
        self.norms.to(next(model.parameters()))

    def channels(self) -> list[int]:
        """Channels of each map."""
        return [self.model.feature_info[i]["num_chs"] for i in self.taken]

    def reduction(self) -> list[int]:
        """Stride of each map."""
        return [self.model.feature_info[i]["reduction"] for i in self.taken]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images [B, channels, height, width] -> maps [B, C, H, W], in order of `out_indices`."""
        maps = self.model.forward_maps(x, self.taken)
        outputs: list[Tensor] = []
        for i, norm in enumerate(self.norms):
            outputs.append(norm(maps[i]).permute(0, 3, 1, 2).contiguous())
        return outputs

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether the backward pass runs blocks again instead of keeping what they compute."""
        self.model.set_grad_checkpointing(enable)


def create_backbone(
    name: str,
    out_indices: Sequence[int] | None = None,
    checkpoint: str | os.PathLike | None = None,
    **kwargs: Any,
) -> DenseBackbone:
    """A registered model as a backbone for dense prediction.

    Args:
        name: As in `timm.create_model`.
        out_indices: See `DenseBackbone`.
        checkpoint: A released file to start from, of a classifier or of a backbone.
        **kwargs: For `timm.create_model`: `pretrained`, `drop_path_rate`, `directions`, ...

    Raises:
        ValueError: If the checkpoint does not fit.
    """
    from .released import load_released

    backbone = DenseBackbone(timm.create_model(name, **kwargs), out_indices)
    if checkpoint is not None:
        load_released(backbone, checkpoint)
    return backbone
