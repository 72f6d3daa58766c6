"""LocalVMamba, registered in timm (paper tables 1 and 2)."""

from typing import Any

from timm.models import generate_default_cfgs, register_model

from .directions import LOCAL, searched_directions
from .hierarchical import LocalVMamba
from .registry import RELEASE, create_hierarchical, pretrained_cfg

HEAD: dict[str, Any] = {"classifier": "head.fc", "pool_size": (7, 7)}
DEMO_HEAD: dict[str, Any] = {
    "size": 32,
    "num_classes": 10,
    "crop_pct": 1.0,
    "classifier": "head.fc",
    "pool_size": (4, 4),
}

default_cfgs = generate_default_cfgs(
    {
        "localvmamba_tiny": pretrained_cfg(**HEAD),
        "localvmamba_small.in1k": pretrained_cfg(RELEASE + "local_vssm_small.ckpt", **HEAD),
        "localvmamba_demo": pretrained_cfg(**DEMO_HEAD),
    }
)

SMALL = (2, 2, 27, 2)
DEMO: dict[str, Any] = {"patch_size": 2, "depths": (1, 1, 2), "drop_path_rate": 0.0}


@register_model
def localvmamba_tiny(pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    """LocalVMamba-T with searched directions: 26M parameters, 82.7 top-1 in the paper."""
    arguments = {"directions": searched_directions("localvmamba_tiny")}
    return create_hierarchical("localvmamba_tiny", pretrained, arguments, kwargs)


@register_model
def localvmamba_small(pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    """LocalVMamba-S with searched directions: 50M parameters, 83.7 top-1 in the paper."""
    arguments = {"depths": SMALL, "directions": searched_directions("localvmamba_small")}
    return create_hierarchical("localvmamba_small", pretrained, arguments, kwargs)


@register_model
def localvmamba_demo(pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    """A LocalVMamba for 32 x 32 images: three stages of widths 32, 64, 128."""
    arguments = {**DEMO, "embed_dims": (32, 64, 128), "directions": LOCAL}
    return create_hierarchical("localvmamba_demo", pretrained, arguments, kwargs)
