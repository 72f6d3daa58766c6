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
from .layouts import OWN, Layout, Source, layout_of, source_of
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
    if isinstance(model, DenseBackbone):
        tensors = {name.removeprefix("model."): x for name, x in tensors.items()}
    converted = _convert(tensors, model)
    if set(tensors) <= set(converted.left_over):
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
    core = model.model if isinstance(model, DenseBackbone) else model
    layout = layout_of(tensors, isinstance(core, LocalVim))
    tensors = {name: x for name, x in tensors.items() if not _is_spare(name, core)}
    if isinstance(core, LocalVim):
        tensors = _fit_positions(tensors, core)
    sources = _sources(model, layout)
    result = _Conversion({}, [], [], [])
    for name, own in model.state_dict().items():
        source = sources[name]
        if name.startswith("norms.") and not _holds_norms(tensors, sources):
            # The checkpoint of a classifier: the norms of the maps stay as they are.
            result.tensors[name] = own
            continue
        absent = [n for n in source.names if n not in tensors]
        result.missing.extend(absent)
        parts = [tensors[n] for n in source.names if n in tensors]
        wrong = [
            f"{n} {list(tensors[n].shape)} (needs {source.shape})"
            for n in source.names
            if n in tensors and list(tensors[n].shape) != source.shape
        ]
        result.misshapen.extend(wrong)
        if not absent:
            result.tensors[name] = parts[0] if wrong else torch.stack(parts).reshape(own.shape)
    used = {n for source in sources.values() for n in source.names}
    result.left_over.extend(name for name in tensors if name not in used)
    return result


def _sources(model: LocalVim | LocalVMamba | DenseBackbone, layout: Layout) -> dict[str, Source]:
    """For each tensor of a model, what makes it up in a checkpoint of that layout."""
    sources = {
        name: source_of(name.removeprefix("model."), x.shape, layout)
        for name, x in model.state_dict().items()
    }
    if isinstance(model, DenseBackbone) and layout is not OWN:
        for i, level in enumerate(model.taken):
            released = f"outnorm_{i}" if model.plain else f"outnorm{level}"
            for part in ("weight", "bias"):
                name = f"norms.{i}.{part}"
                sources[name] = Source([f"{released}.{part}"], sources[name].shape)
    return sources


def _holds_norms(tensors: dict[str, Tensor], sources: dict[str, Source]) -> bool:
    """Whether a checkpoint is that of a backbone, with norms for its maps."""
    norms = [source for name, source in sources.items() if name.startswith("norms.")]
    return any(source.names[0] in tensors for source in norms)


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
