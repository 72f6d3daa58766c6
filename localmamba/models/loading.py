"""Models by timm's name, and checkpoints of the command line as models."""

import difflib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .released import RECORD

KEY = "localmamba"
"""Entry of a checkpoint's metadata that describes its model, in JSON."""

FILE = "model.safetensors"
"""Name of the checkpoint in a folder that `localmamba train` writes."""


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
    model = build_model(card["model"], card["arguments"])
    # Checkpoints from before directions were recorded; their arguments name them.
    records = {name: x for name, x in model.state_dict().items() if name.endswith(RECORD)}
    try:
        model.load_state_dict({**records, **state})
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
    try:
        card = json.loads(metadata[KEY])
        for key in ("model", "arguments", "classes"):
            card[key]
        for key in ("size", "channels", "mean", "std"):
            card["input"][key]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} has a broken description of its model ({error!r})") from None
    return card, state
