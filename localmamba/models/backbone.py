"""Backbones for dense prediction as released, and the loading of released checkpoints."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from .base import ScanModel
from .checkpoints import find_tensors, read_checkpoint
from .layouts import OWN, Layout, Source
from .localvim import LocalVim
from .localvmamba import LocalVMamba
from .released import RECORD, convert


class DenseBackbone(nn.Module):
    """Feature maps for detection and segmentation, as the released backbones return them.

    Outputs of chosen stages of a LocalVMamba, or of the mixers of chosen blocks of a LocalVim (not
    its residual stream, which `features_only=True` returns), each through a LayerNorm.

    Args:
        model: A LocalVim or LocalVMamba; parts that no map needs are removed.
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

    plain: torch.jit.Final[bool]

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
        self.model: Any = model
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in self.channels())
        self.norms.to(next(model.parameters()))

    def channels(self) -> list[int]:
        """Returns the channels of each map."""
        return [self.model.feature_info[i]["num_chs"] for i in self.taken]

    def reduction(self) -> list[int]:
        """Returns the stride of each map."""
        return [self.model.feature_info[i]["reduction"] for i in self.taken]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images [B, channels, height, width] -> maps [B, C, H, W], in order of `out_indices`."""
        maps: list[Tensor] = []
        last = self.taken[-1] + 1
        if self.plain:
            _, _, pairs, height, width = self.model.run_blocks(x, self.taken, last)
            for hidden, _ in pairs:
                hidden = self.model.without_class_token(hidden, height, width)
                maps.append(hidden.unflatten(1, (height, width)))
        else:
            maps = self.model.run_stages(x, self.taken, last)[1]
        outputs: list[Tensor] = []
        for i, norm in enumerate(self.norms):
            outputs.append(norm(maps[i]).permute(0, 3, 1, 2).contiguous())
        return outputs

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switches activation checkpointing of the blocks on or off."""
        self.model.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def _norm_sources(self, layout: Layout) -> dict[str, Source]:
        """Released names of the norms: numbered by map for LocalVim, by stage for LocalVMamba."""
        sources = {}
        for i, level in enumerate(self.taken):
            released = f"outnorm_{i}" if self.plain else f"outnorm{level}"
            for part in ("weight", "bias"):
                name = f"norms.{i}.{part}"
                given = name if layout is OWN else f"{released}.{part}"
                sources[name] = Source([given], [self.channels()[i]])
        return sources


def load_released(
    model: nn.Module, source: str | os.PathLike[str] | Mapping[str, Any], ema: bool | None = None
) -> nn.Module:
    """Loads a released checkpoint of LocalMamba, Vim or VMamba into a model, strictly.

    Position tables of another grid are resampled bicubically. A `DenseBackbone` takes the
    checkpoint of a backbone, or that of a classifier, whose head it leaves out. Releases do not
    record scan directions: these must be the model's.

    Args:
        model: A `LocalVim`, `LocalVMamba` (which serve Vim, VMamba and supernets too) or
            `DenseBackbone`.
        source: A file (.ckpt, .pth, .safetensors) or a state dict, in the released layout or in
            this package's own.
        ema: Whether to take averaged weights; None takes them where there are any.

    Returns:
        The model.

    Raises:
        ValueError: If the file cannot be read; if tensors are missing, left over or of another
            shape, all of which it names; or if the checkpoint records other scan directions. A head
            of another number of classes does not fit, unless the model has `num_classes=0`.
    """
    if not isinstance(model, (ScanModel, DenseBackbone)):
        raise ValueError(
            f"model must be a LocalVim, LocalVMamba or DenseBackbone, got {type(model).__name__}"
        )
    content = source if isinstance(source, Mapping) else read_checkpoint(source)
    tensors = find_tensors(content, ema)
    if isinstance(model, DenseBackbone):
        tensors = {name.removeprefix("model."): x for name, x in tensors.items()}
        converted = convert(tensors, model.model, model.state_dict(), model._norm_sources)
    else:
        converted = convert(tensors, model)
    if set(tensors) <= set(converted.left_over):
        some = ", ".join(list(tensors)[:3])
        raise ValueError(f"the checkpoint holds nothing of this model, but {some}, ...")
    if problems := converted.problems():
        raise ValueError(f"the checkpoint does not fit the model: {'; '.join(problems)}")
    for name, x in converted.tensors.items():  # before any weight is copied
        if name.endswith(RECORD):
            model.get_submodule(name.removesuffix(f".{RECORD}")).set_extra_state(x)
    model.load_state_dict(converted.tensors)
    return model


def create_backbone(
    name: str,
    out_indices: Sequence[int] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> DenseBackbone:
    """Creates a registered model as a backbone for dense prediction.

    Args:
        name: Model name, as in `timm.create_model`.
        out_indices: Stages or blocks, see `DenseBackbone`.
        checkpoint: Released file to start from, of a classifier or of a backbone.
        **kwargs: For `timm.create_model`: `pretrained`, `drop_path_rate`, `directions`, ...

    Raises:
        ValueError: If the checkpoint does not fit.
    """
    backbone = DenseBackbone(timm.create_model(name, **kwargs), out_indices)
    if checkpoint is not None:
        load_released(backbone, checkpoint)
    return backbone
