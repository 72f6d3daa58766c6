"""The base class of the models, their timm configuration, and their creation through timm."""

from collections.abc import Callable
from typing import Any, ClassVar
from urllib.error import URLError

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, get_pretrained_cfg
from torch import Tensor, nn

from .layouts import Layout

UNDECAYED = ("A_log", "D", "dt_bias", "alpha", "pos_embed", "cls_token")
"""Last parts of the names of parameters that get no weight decay."""

RELEASE = "https://github.com/hunto/LocalMamba/releases/download/v1.0.0/"


def check_images(x: Tensor, in_chans: int) -> Tensor:
    """Returns the images; raises ValueError if they are not [B, in_chans, height, width]."""
    if x.dim() != 4 or x.shape[1] != in_chans:
        raise ValueError(f"images must be [B, {in_chans}, height, width], got {x.shape}")
    return x


class ScanModel(nn.Module):
    """Base of `LocalVim` and `LocalVMamba`.

    Attributes:
        layouts: Layouts of released checkpoints, by a part of a name that only this layout has; the
            last one serves the rest.

    Args:
        num_classes: Outputs of the head; 0 for none.
        in_chans: Channels of an image.
        feature_info: timm's description of the features, one entry per block or stage.
    """

    layouts: ClassVar[dict[str, Layout]]

    def __init__(self, num_classes: int, in_chans: int, feature_info: list[dict[str, Any]]):
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.feature_info = feature_info

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Returns the names of parameters without weight decay (biases are the recipe's)."""
        names = (name for name, _ in self.named_parameters())
        return {name for name in names if name.rsplit(".", 1)[-1] in UNDECAYED}

    @torch.jit.ignore
    def resize_released(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fits the tensors of a checkpoint that depend on the image size to this model."""
        return tensors


def pretrained_cfg(
    url: str = "", size: int = 224, num_classes: int = 1000, **fields: Any
) -> dict[str, Any]:
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


def build(
    model_class: Callable[..., ScanModel], variant: str, pretrained: bool, **kwargs: Any
) -> Any:
    """`build_model_with_cfg`, with an error of one line where weights cannot be fetched."""
    try:
        return build_model_with_cfg(model_class, variant, pretrained, **kwargs)
    except (URLError, TimeoutError, ConnectionError) as error:
        config = get_pretrained_cfg(variant)
        raise RuntimeError(
            f"cannot fetch the released weights of {variant} from {config and config.url} "
            f"({getattr(error, 'reason', error)}); without internet, download the file elsewhere "
            "and pass it to localmamba.load_released"
        ) from error
