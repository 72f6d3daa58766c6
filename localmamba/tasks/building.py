"""Models by timm's name, for given images and classes."""

import warnings
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from torch import nn

from localmamba.data import ImageSettings, InputSpec
from localmamba.layers import DirectionalMixer
from localmamba.models.backbone import load_released
from localmamba.models.checkpoints import find_tensors, read_checkpoint
from localmamba.models.directions import DirectionTable
from localmamba.models.loading import KEY, build_model, check_model
from localmamba.search import start_from_supernet
from localmamba.tasks.checkpoints import load_checkpoint


def input_spec(name: str, settings: ImageSettings, channels: int) -> InputSpec:
    """Returns the input of a model: the settings, or else the model's own configuration.

    Args:
        name: timm's name of the model.
        settings: Image size and crop.
        channels: Channels of the images: 1 or 3.

    Raises:
        ValueError: If there is no such model.
    """
    config = timm.get_pretrained_cfg(check_model(name))
    own = config.to_dict() if config else {}
    mean, std = (tuple(own.get(key) or (0.5,) * 3) for key in ("mean", "std"))
    if channels == 1:
        mean, std = ((sum(values) / len(values),) for values in (mean, std))
    return InputSpec(
        size=settings.image_size or own.get("input_size", (3, 224, 224))[-1],
        channels=channels,
        mean=mean,
        std=std,
        interpolation=own.get("interpolation") or "bicubic",
        crop_pct=settings.crop_pct or own.get("crop_pct") or 1.0,
    )


def model_arguments(
    name: str,
    spec: InputSpec,
    num_classes: int,
    directions: DirectionTable | None = None,
    drop_path: float | None = None,
    others: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns the arguments of `timm.create_model` for these images and classes, without None."""
    config = timm.get_pretrained_cfg(name)
    own_size = config.input_size[-1] if config and config.input_size else None
    arguments = {
        "num_classes": num_classes,
        "in_chans": spec.channels,
        # Only some models take it; the others take any size.
        "img_size": spec.size if spec.size != own_size else None,
        "directions": directions,
        "drop_path_rate": drop_path,
        **(others or {}),
    }
    return {key: value for key, value in arguments.items() if value is not None}


def model_directions(model: nn.Module) -> list[list[str]]:
    """Returns the scan directions of every block; empty for a model that has none."""
    return [list(m.directions) for m in model.modules() if isinstance(m, DirectionalMixer)]


def start_from(
    model: nn.Module, path: str, name: str, arguments: dict[str, Any], size: int
) -> None:
    """Copies the weights of a checkpoint into a model, with a warning if the head is left out.

    Position tables are resampled to the model's grid.

    Args:
        model: Model to train.
        path: Checkpoint that this package wrote, or a released one.
        name: timm's name of the model.
        arguments: Arguments that it was made with.
        size: Side of the images.

    Raises:
        ValueError: If the checkpoint cannot be read or does not fit.
    """
    if _has_card(path):
        source, card = load_checkpoint(path)
        classes = len(card.classes)
        if size != card.input.size and hasattr(source, "set_input_size"):
            source.set_input_size(size)  # type: ignore[operator]
    else:
        tensors = find_tensors(read_checkpoint(path))
        heads = [x for key, x in tensors.items() if key.endswith("head.weight")]
        classes = len(heads[0]) if heads else 0
        source = build_model(name, {**arguments, "num_classes": classes})
        load_released(source, tensors)
    if left := start_from_supernet(model, source):
        warnings.warn(
            f"{' and '.join(left)} start anew: {path} is of {classes} classes, the data has "
            f"{arguments['num_classes']}",
            stacklevel=2,
        )


def _has_card(path: str) -> bool:
    """Returns whether a checkpoint says which model it is, as those of this package do."""
    if Path(path).is_dir() or not Path(path).exists():
        return True  # `load_checkpoint` knows the file in the folder, and what to say of none
    try:
        with safe_open(path, "pt") as content:
            return KEY in (content.metadata() or {})
    except (SafetensorError, OSError):
        return False
