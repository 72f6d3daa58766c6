"""Models by timm's name, and checkpoints of the command line as models."""

import difflib
import inspect
import json
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from .released import RECORD

KEY = "localmamba"
"""Entry of a checkpoint's metadata that describes its model, in JSON."""

CHECKSUM = "sha256"
"""Entry of a checkpoint's metadata with the checksum of its description and its tensors."""

FILE = "model.safetensors"
"""Name of the checkpoint in a folder that `localmamba train` writes."""

NUMBER = (int, float)
CARD = {
    "model": str, "arguments": dict, "classes": list, "input": dict, "data": str,
    "held_out": NUMBER, "split_seed": int, "metrics": dict,
}  # fmt: skip
INPUT = {
    "size": int, "channels": int, "mean": list, "std": list, "interpolation": str,
    "crop_pct": NUMBER,
}  # fmt: skip
"""Fields of a description and of its input, and their types; the first four are required."""

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random")

FOREIGN = {*inspect.signature(timm.create_model).parameters, "features_only"} - {"kwargs"}
"""Arguments that a description may not hold: they read other files, or make no classifier."""

MAX_NUMBER = 10**5
"""Largest number among the arguments and the input of a description."""


PACKAGE_ARGUMENTS: dict[str, Callable[[nn.Module, Any], nn.Module]] = {}
"""Arguments of `build_model` that later parts of this package handle: (model, value) -> model."""


def check_model(name: str) -> str:
    """Returns the name; raises ValueError with the closest names if timm has no such model."""
    if not timm.is_model(name):
        known = timm.list_models()
        close = difflib.get_close_matches(name, known, n=4) or timm.list_models("local*")
        raise ValueError(f"unknown model {name!r}; did you mean: {', '.join(close)}?")
    return name


def build_model(name: str, arguments: dict[str, Any], pretrained: bool = False) -> nn.Module:
    """`timm.create_model` with errors of one line.

    Args:
        name: timm's name of the model.
        arguments: Arguments of the model, and of `PACKAGE_ARGUMENTS`. `img_size` is dropped where
            the model takes none.
        pretrained: Whether to start from weights that timm fetches.

    Raises:
        ValueError: If the name, an argument, the directions or the weights do not fit.
    """
    check_model(name)
    own = {key: value for key, value in arguments.items() if key not in PACKAGE_ARGUMENTS}
    try:
        model = timm.create_model(name, pretrained=pretrained, **own)
    except TypeError as error:
        if "img_size" in str(error) and "img_size" in arguments:
            others = {key: value for key, value in arguments.items() if key != "img_size"}
            return build_model(name, others, pretrained)
        raise ValueError(f"{name}: {_first_line(error)}") from error
    except (AssertionError, OSError, RuntimeError) as error:
        raise ValueError(f"{name}: {_first_line(error)}") from error
    for key in arguments.keys() - own.keys():
        model = PACKAGE_ARGUMENTS[key](model, arguments[key])
    return model


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def load(path: str | os.PathLike[str]) -> nn.Module:
    """Loads a model that `localmamba train` or `localmamba search` wrote.

    Args:
        path: Checkpoint file, or the folder that holds `model.safetensors`.

    Returns:
        The model in evaluation mode. `model.classes` holds the class names in the order of the
        outputs; `model.pretrained_cfg` the input size, mean and standard deviation of its training,
        so that `timm.data.resolve_model_data_config(model)` gives its preprocessing.

    Raises:
        ValueError: If the file is missing, broken, of another kind or of an unknown model.

    Example:
        >>> model = localmamba.load("runs/flowers")  # doctest: +SKIP
        >>> config = timm.data.resolve_model_data_config(model)  # doctest: +SKIP
        >>> transform = timm.data.create_transform(**config)  # doctest: +SKIP
    """
    return load_with_card(path)[0]


def load_with_card(path: str | os.PathLike[str]) -> tuple[nn.Module, dict[str, Any]]:
    """Loads a model as `load` does; returns also the description that its checkpoint holds."""
    card, state = _read(path)
    try:
        # Without memory first: what is described has to be what the file holds.
        with torch.device("meta"), _parameters_limited(1000 + 10 * len(state)):
            described = build_model(card["model"], card["arguments"]).state_dict()
        if _count(described) > _count(state) + _count(_records(described)):
            raise ValueError(f"does not fit {card['model']}, which has more weights")
        model = build_model(card["model"], card["arguments"])
    except Exception as error:  # an argument that does not fit may raise anything
        raise ValueError(f"{os.fspath(path)}: {_first_line(error)}") from None
    # Checkpoints from before directions were recorded; their arguments name them.
    try:
        model.load_state_dict({**_records(model.state_dict()), **state})
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{os.fspath(path)} does not fit {card['model']}: {reason}") from None
    spec = card["input"]
    config = {
        **getattr(model, "pretrained_cfg", {}),
        "url": "",
        "num_classes": len(card["classes"]),
        "label_names": list(card["classes"]),
        "input_size": (spec["channels"], spec["size"], spec["size"]),
        "mean": tuple(spec["mean"]),
        "std": tuple(spec["std"]),
        "interpolation": spec.get("interpolation", "bicubic"),
        "crop_pct": spec.get("crop_pct", 1.0),
    }
    classes = tuple(card["classes"])
    for name, value in {
        "classes": classes,
        "pretrained_cfg": config,
        "default_cfg": config,
    }.items():
        setattr(model, name, value)
    return model.eval(), card


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads the description and the tensors of a checkpoint. No code of the file is run."""
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(f"no checkpoint {str(file)!r}; `localmamba train` writes {FILE}")
    try:
        with safe_open(file, "pt") as content:
            metadata = content.metadata() or {}
            state = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is no safetensors file, or cut short ({error})") from None
    if KEY not in metadata:
        raise ValueError(
            f"{file} does not say which model it is; only checkpoints of `localmamba train` do "
            "(weights of the paper: localmamba.load_released)"
        )
    if set(metadata) <= {KEY, "format"}:
        warnings.warn(f"{file} holds no checksum; damage would not be noticed", stacklevel=4)
    elif metadata.get(CHECKSUM) != checksum(metadata[KEY], state):
        raise ValueError(f"{file} is damaged: its checksum is another; take a copy of it")
    try:
        card = json.loads(metadata[KEY])
        _check_card(card)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} has a broken description of its model ({error})") from None
    return card, state


def checksum(card: str, state: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of a description, and of the tensors with their names and types."""
    digest = sha256(card.encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_card(card: Any) -> None:
    """Raises ValueError if a description is not one of an image classifier of sane size."""
    _check_fields("the description", card, CARD)
    _check_fields("its input", card["input"], INPUT)
    spec, arguments = card["input"], card["arguments"]
    _check_numbers([spec, arguments])
    if reading := sorted(FOREIGN & arguments.keys()):
        raise ValueError(f"arguments {', '.join(reading)} are not for checkpoints")
    if isinstance(arguments.get("directions"), str):
        raise ValueError("directions have to be lists, not a file")
    for what, values, kind in (
        ("classes", card["classes"], str), ("mean", spec["mean"], NUMBER),
        ("std", spec["std"], NUMBER), ("metrics", list(card.get("metrics", {}).values()), NUMBER),
    ):  # fmt: skip
        if not all(isinstance(value, kind) for value in values):
            raise ValueError(f"{what} holds values of the wrong type")
    if min(len(card["classes"]), spec["size"], spec["channels"]) < 1 or min(spec["std"]) <= 0:
        raise ValueError("classes, size, channels and std have to be above 0")
    if not 0 < spec.get("crop_pct", 1) <= 1:
        raise ValueError("crop_pct has to be above 0 and at most 1")
    if spec.get("interpolation", "bicubic") not in INTERPOLATIONS:
        raise ValueError(f"interpolation has to be one of {', '.join(INTERPOLATIONS)}")
    for name, found in {
        "mean": len(spec["mean"]), "std": len(spec["std"]),
        "in_chans": arguments.get("in_chans", spec["channels"]),
    }.items():  # fmt: skip
        if found != spec["channels"]:
            raise ValueError(f"{name} does not fit {spec['channels']} channels")
    if arguments.get("num_classes", len(card["classes"])) != len(card["classes"]):
        raise ValueError(f"num_classes does not fit {len(card['classes'])} class names")


def _check_fields(what: str, content: Any, fields: Mapping[str, Any]) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{what} is no table")
    if missing := set(list(fields)[:4]) - content.keys():
        raise ValueError(f"{what} lacks {', '.join(sorted(missing))}")
    for key, value in content.items():
        if key not in fields:
            raise ValueError(f"{what} holds an unknown {key!r}")
        if not isinstance(value, fields[key]) or isinstance(value, bool):
            raise ValueError(f"{key} is of the wrong type, {type(value).__name__}")


def _check_numbers(value: Any) -> None:
    """Raises ValueError if a number in a description is not finite or too large."""
    if isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            _check_numbers(entry)
    elif isinstance(value, int | float) and not -MAX_NUMBER <= value <= MAX_NUMBER:
        raise ValueError(f"{value:g} is out of range, allowed: up to {MAX_NUMBER}")


@contextmanager
def _parameters_limited(limit: int) -> Iterator[None]:
    """Raises ValueError when this thread makes a model of more parameters."""
    thread, made = threading.get_ident(), 0

    def count(*_: Any) -> None:
        nonlocal made
        made += threading.get_ident() == thread
        if made > limit:
            raise ValueError("the model that it describes has many more tensors than it holds")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _records(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.endswith(RECORD)}


def _count(state: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in state.values())
