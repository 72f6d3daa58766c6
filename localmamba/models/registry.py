"""How a model is made through timm: its configuration, its features, its released weights."""

from collections.abc import Callable
from typing import Any
from urllib.error import URLError

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, get_pretrained_cfg
from torch import nn

from .hierarchical import LocalVMamba
from .plain import LocalVim
from .released import checkpoint_filter_fn

RELEASE = "https://github.com/hunto/LocalMamba/releases/download/v1.0.0/"


def pretrained_cfg(url: str = "", size: int = 224, num_classes: int = 1000, **fields: Any) -> dict:
    """A timm pretrained configuration; `fields` are timm's (`classifier`, `pool_size`, ...)."""
    return {
        "url": url,
        "num_classes": num_classes,
        "input_size": (3, size, size),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2403.09338",
        "paper_name": "LocalMamba: Visual State Space Model with Windowed Selective Scan",
        "origin_url": "https://github.com/hunto/LocalMamba",
        **fields,
    }


def create_plain(
    variant: str,
    pretrained: bool,
    arguments: dict[str, Any],
    overrides: dict[str, Any],
    build: Callable[..., LocalVim] = LocalVim,
) -> LocalVim:
    """A registered LocalVim or Vim; its features are four blocks at equal steps, normalised."""
    depth = overrides.get("depth", arguments.get("depth", 20))
    taps = tuple(depth * step // 4 - 1 for step in (1, 2, 3, 4))
    features = {"out_indices": taps, "feature_cls": "getter", "norm": True}
    return _create(build, variant, pretrained, features, {**arguments, **overrides})


def create_hierarchical(
    variant: str,
    pretrained: bool,
    arguments: dict[str, Any],
    overrides: dict[str, Any],
    build: Callable[..., LocalVMamba] = LocalVMamba,
) -> LocalVMamba:
    """A registered LocalVMamba or VMamba; its features are what the stages put out."""
    stages = len(overrides.get("depths", arguments.get("depths", (0,) * 4)))
    features = {"out_indices": tuple(range(stages)), "feature_cls": "getter"}
    return _create(build, variant, pretrained, features, {**arguments, **overrides})


def _create(
    model_class: Callable[..., nn.Module],
    variant: str,
    pretrained: bool,
    feature_cfg: dict[str, Any],
    arguments: dict[str, Any],
) -> Any:
    """`build_model_with_cfg`, with one line of error where weights cannot be fetched."""
    try:
        return build_model_with_cfg(
            model_class,
            variant,
            pretrained,
            feature_cfg=feature_cfg,
            pretrained_filter_fn=checkpoint_filter_fn,
            **arguments,
        )
    except (URLError, TimeoutError, ConnectionError) as error:
        config = get_pretrained_cfg(variant)
        raise RuntimeError(
            f"cannot fetch the released weights of {variant} from {config and config.url} "
            f"({getattr(error, 'reason', error)}); without internet, download the file elsewhere "
            "and pass it to localmamba.load_released"
        ) from error
