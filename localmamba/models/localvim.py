"""LocalVim, registered in timm (paper tables 1 and 2)."""

from typing import Any

from timm.models import generate_default_cfgs, register_model

from .directions import LOCAL, searched_directions
from .plain import LocalVim
from .registry import RELEASE, create_plain, pretrained_cfg

default_cfgs = generate_default_cfgs(
    {
        "localvim_tiny.in1k": pretrained_cfg(RELEASE + "local_vim_tiny.ckpt"),
        "localvim_tiny_midcls.in1k": pretrained_cfg(
            RELEASE + "local_vim_tiny_middle_cls_token.ckpt"
        ),
        "localvim_small": pretrained_cfg(),
        "localvim_tiny_nosearch": pretrained_cfg(),
        "localvim_small_nosearch": pretrained_cfg(),
        "localvim_demo": pretrained_cfg(size=8, num_classes=10, crop_pct=1.0),
    }
)

DEMO: dict[str, Any] = {
    "img_size": 8,
    "patch_size": 1,
    "depth": 4,
    "d_state": 8,
    "drop_path_rate": 0.0,
}


@register_model
def localvim_tiny(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-T with searched directions: 8M parameters, 76.2 top-1 in the paper."""
    arguments = {"directions": searched_directions("localvim_tiny")}
    return create_plain("localvim_tiny", pretrained, arguments, kwargs)


@register_model
def localvim_small(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-S with the directions searched for T: 28M parameters, 81.2 top-1 in the paper."""
    arguments = {"embed_dim": 384, "directions": searched_directions("localvim_tiny")}
    return create_plain("localvim_small", pretrained, arguments, kwargs)


@register_model
def localvim_tiny_nosearch(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-T*, rows and 2 x 2 windows in every block: 75.8 top-1 in the paper."""
    return create_plain("localvim_tiny_nosearch", pretrained, {"directions": LOCAL}, kwargs)


@register_model
def localvim_small_nosearch(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-S*, rows and 2 x 2 windows in every block: 81.0 top-1 in the paper."""
    arguments = {"embed_dim": 384, "directions": LOCAL}
    return create_plain("localvim_small_nosearch", pretrained, arguments, kwargs)


@register_model
def localvim_tiny_midcls(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-T with a class token in the middle, no rotary embedding: 77.8 top-1 (release)."""
    arguments = {
        "directions": searched_directions("localvim_tiny"),
        "class_token": True,
        "global_pool": "token",
    }
    return create_plain("localvim_tiny_midcls", pretrained, arguments, kwargs)


@register_model
def localvim_demo(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """A LocalVim for 8 x 8 images (handwritten digits): width 32, 4 blocks, 8 states a channel."""
    arguments = {**DEMO, "embed_dim": 32, "directions": LOCAL}
    return create_plain("localvim_demo", pretrained, arguments, kwargs)
