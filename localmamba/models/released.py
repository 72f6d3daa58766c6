"""Conversion of released checkpoints into the layout of this package."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .base import ScanModel
from .checkpoints import find_tensors
from .layouts import Layout, Source, layout_of, source_of

RECORD = "_extra_state"
"""Last part of the names under which a state dict records scan directions."""


class Conversion(NamedTuple):
    """Tensors under the names of a model, and the released names of those that do not fit."""

    tensors: dict[str, Tensor]
    missing: list[str]
    misshapen: list[str]
    left_over: list[str]

    def problems(self) -> list[str]:
        """Describes what does not fit, one entry per kind."""
        kinds = {"missing": self.missing, "left over": self.left_over}
        kinds["wrong shape"] = self.misshapen
        return [f"{kind} {', '.join(names)}" for kind, names in kinds.items() if names]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: ScanModel) -> dict[str, Tensor]:
    """timm's hook between a file and a model: renames and resizes; timm then adapts and checks."""
    tensors = find_tensors(state_dict)
    converted = convert(tensors, model)
    return {**converted.tensors, **{name: tensors[name] for name in converted.left_over}}


def convert(
    tensors: Mapping[str, Tensor],
    model: ScanModel,
    state: Mapping[str, Tensor] | None = None,
    others: Callable[[Layout], Mapping[str, Source]] | None = None,
) -> Conversion:
    """Converts the tensors of a checkpoint to the names and shapes of a model.

    Args:
        tensors: Tensors in a released layout, or in this package's own.
        model: The model that they are for.
        state: State dict to fill, of the model by default, or of a module with it as `model`.
        others: Sources of the tensors of that module that are none of the model's; where a
            checkpoint has none of them, they keep their values.
    """
    layout = layout_of(tensors, model.layouts)
    tensors = {name: x for name, x in tensors.items() if not _is_spare(name, model)}
    tensors = model.resize_released(tensors)
    state = model.state_dict() if state is None else state
    extra = {} if others is None else others(layout)
    kept = set() if any(n in tensors for x in extra.values() for n in x.names) else set(extra)
    result = Conversion({}, [], [], [])
    used: set[str] = set()
    for name, own in state.items():
        source = extra.get(name) or source_of(name.removeprefix("model."), own.shape, layout)
        used.update(source.names)
        # Releases do not record directions.
        if name in kept or (name.endswith(RECORD) and source.names[0] not in tensors):
            result.tensors[name] = own
            continue
        if name.endswith(RECORD):
            result.tensors[name] = tensors[source.names[0]]
            continue
        absent = [n for n in source.names if n not in tensors]
        result.missing.extend(absent)
        parts = {n: tensors[n] for n in source.names if n in tensors}
        wrong = [
            f"{n} {list(x.shape)} (needs {source.shape})"
            for n, x in parts.items()
            if list(x.shape) != source.shape
        ]
        result.misshapen.extend(wrong)
        if not absent:
            values = list(parts.values())
            result.tensors[name] = values[0] if wrong else torch.stack(values).reshape(own.shape)
    result.left_over.extend(name for name in tensors if name not in used)
    return result


def _is_spare(name: str, model: ScanModel) -> bool:
    """Whether a tensor belongs to a part that the model was made without, or that was removed."""
    if model.num_classes == 0 and re.match(r"(classifier\.)?head\.", name):
        return True
    if isinstance(model.norm, nn.Identity) and re.match(r"(norm_f|classifier\.norm|norm)\.", name):
        return True
    group = model.feature_info[0]["module"].split(".")[0]
    kept = len(list(model.get_submodule(group).children()))
    if kept == len(model.feature_info):
        return False
    position = re.match(r"(?:layers|blocks|stages)\.(\d+)\.", name)
    cut = position is not None and int(position[1]) >= kept
    return cut or name.startswith(f"layers.{kept - 1}.downsample.")
