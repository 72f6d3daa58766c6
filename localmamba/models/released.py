"""Released checkpoints, in their own layout, into the models of this package."""

import math
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers import resize_table
from .backbone import DenseBackbone
from .checkpoints import find_tensors, read_checkpoint
from .hierarchical import LocalVMamba
from .layouts import layout_of, source_of
from .plain import LocalVim

ROTARY = {"rope.freqs_cos": "rope.cos", "rope.freqs_sin": "rope.sin"}


class _Conversion(NamedTuple):
    tensors: dict[str, Tensor]
    missing: list[str]
    misshapen: list[str]
    left_over: list[str]


def load_released(
    model: nn.Module,
    source: str | os.PathLike | Mapping[str, Any],
    ema: bool | None = None,
) -> nn.Module:
    """Loads a released checkpoint of LocalMamba, Vim or VMamba into a model, strictly.

    Position tables of another grid are resampled bicubically. A `DenseBackbone` takes the
    checkpoint of a backbone, or that of a classifier, whose head it leaves out.

    Args:
        model: A `LocalVim`, `LocalVMamba` (these serve Vim, VMamba and supernets too) or
            `DenseBackbone`.
        source: A file (.ckpt, .pth, .safetensors) or a state dict, in the released layout or in
            this package's own.
        ema: Whether to take averaged weights; None takes them where there are any.

    Returns:
        The model.

    Raises:
        ValueError: If the file cannot be read; or if tensors are missing, left over or of another
            shape, all of which it names. A head of another number of classes does not fit, unless
            the model has `num_classes=0`.
    """
    if not isinstance(model, (LocalVim, LocalVMamba, DenseBackbone)):
        raise ValueError(
            f"model must be a LocalVim, LocalVMamba or DenseBackbone, got {type(model).__name__}"
        )
    content = source if isinstance(source, Mapping) else read_checkpoint(source)
    tensors = find_tensors(content, ema)
    converted = _convert(tensors, model)
    if not converted.tensors:
        some = ", ".join(list(tensors)[:3])
        raise ValueError(f"the checkpoint holds nothing of this model, but {some}, ...")
    problems = [
        f"{kind} {', '.join(names)}"
        for kind, names in (
            ("missing", converted.missing),
            ("left over", converted.left_over),
            ("wrong shape", converted.misshapen),
        )
        if names
    ]
    if problems:
        raise ValueError(f"the checkpoint does not fit the model: {'; '.join(problems)}")
    model.load_state_dict(converted.tensors)
    return model


def checkpoint_filter_fn(
    state_dict: dict[str, Any], model: LocalVim | LocalVMamba
) -> dict[str, Tensor]:
    """timm's hook between a file and a model: renames and resizes; timm then adapts and checks."""
    tensors = find_tensors(state_dict)
    converted = _convert(tensors, model)
    return {**converted.tensors, **{name: tensors[name] for name in converted.left_over}}


def _convert(
    tensors: dict[str, Tensor], model: LocalVim | LocalVMamba | DenseBackbone
) -> _Conversion:
    """Tensors under the names of the model, and the released names of those that do not fit."""
    if isinstance(model, DenseBackbone):
        core = model.model
        tensors = _with_output_norms(tensors, model)
    else:
        core = model
    tensors = {name: x for name, x in tensors.items() if not _is_spare(name, core)}
    if isinstance(core, LocalVim):
        tensors = _fit_positions(tensors, core)
    layout = layout_of(tensors, isinstance(core, LocalVim))
    result = _Conversion({}, [], [], [])
    used: set[str] = set()
    for name, own in model.state_dict().items():
        source = source_of(name.removeprefix("model."), own.shape, layout)
        used.update(source.names)
        parts = [tensors[n] for n in source.names if n in tensors]
        result.missing.extend(n for n in source.names if n not in tensors)
        wrong = [
            f"{n} {list(tensors[n].shape)} (needs {source.shape})"
            for n in source.names
            if n in tensors and list(tensors[n].shape) != source.shape
        ]
        result.misshapen.extend(wrong)
        if parts and len(parts) == len(source.names):
            result.tensors[name] = parts[0] if wrong else torch.stack(parts).reshape(own.shape)
    result.left_over.extend(name for name in tensors if name not in used)
    return result


def _is_spare(name: str, core: LocalVim | LocalVMamba) -> bool:
    """Whether a tensor belongs to a part that the model was made or cut without."""
    if core.num_classes == 0 and re.match(r"(classifier\.)?head\.", name):
        return True
    if isinstance(core.norm, nn.Identity) and re.match(r"(norm_f|classifier\.norm|norm)\.", name):
        return True
    kept = len(core.blocks if isinstance(core, LocalVim) else core.stages)
    if kept == len(core.feature_info):
        return False
    position = re.match(r"(?:layers|blocks|stages)\.(\d+)\.", name)
    cut = position is not None and int(position[1]) >= kept
    return cut or name.startswith(f"layers.{kept - 1}.downsample.")


def _with_output_norms(tensors: dict[str, Tensor], model: DenseBackbone) -> dict[str, Tensor]:
    """Names the norms of a backbone as this package does; a classifier's checkpoint has none."""
    prefix = "outnorm_" if model.plain else "outnorm"
    tensors = {name.removeprefix("model."): x for name, x in tensors.items()}
    for i, level in enumerate(model.taken):
        number = i if model.plain else level
        for part in ("weight", "bias"):
            if (given := tensors.pop(f"{prefix}{number}.{part}", None)) is not None:
                tensors[f"norms.{i}.{part}"] = given
    if not any(name.startswith("norms.") for name in tensors):
        tensors.update({f"norms.{name}": x for name, x in model.norms.state_dict().items()})
    return tensors


def _fit_positions(tensors: dict[str, Tensor], model: LocalVim) -> dict[str, Tensor]:
    """Position tables on the grid of the model, the rotary ones made where the checkpoint has none.

    The rotary tables go with the positions: on another grid they are resampled, not computed anew.
    """
    tensors = {ROTARY.get(name, name): x for name, x in tensors.items()}
    class_token = model.cls_token is not None
    table = tensors.get("pos_embed")
    if table is None or table.dim() != 3:
        return tensors
    side = math.isqrt(table.shape[1] - class_token)
    grid = (side, side) if side * side == table.shape[1] - class_token else model.grid
    tables = {"pos_embed": table}
    if model.rope is not None:
        made = dict(zip(("rope.cos", "rope.sin"), model.rope.tables(grid), strict=True))
        tables |= {name: tensors.get(name, table) for name, table in made.items()}
    for name, given in tables.items():
        with_token = class_token and name == "pos_embed"
        given = given.reshape(1, -1, given.shape[-1])
        if given.shape[1] == grid[0] * grid[1] + with_token:
            given = given.to(model.pos_embed.dtype)
            given = resize_table(given, grid, *model.grid, class_token=with_token)
        tensors[name] = given
    return tensors
