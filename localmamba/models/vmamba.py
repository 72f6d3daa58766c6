"""VMamba, which LocalVMamba builds on, as first published, registered in timm.

Source: VMamba, https://arxiv.org/abs/2401.10166.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model

from ..layers.mixer import CROSS
from .base import pretrained_cfg
from .localvmamba import LocalVMamba, create_localvmamba

CONFIG: dict[str, Any] = {
    "classifier": "head.fc",
    "pool_size": (7, 7),
    "paper_ids": "arXiv:2401.10166",
    "paper_name": "VMamba: Visual State Space Model",
    "origin_url": "https://github.com/MzeroMiko/VMamba",
}

default_cfgs = generate_default_cfgs(
    {
        "vmamba_tiny": pretrained_cfg(**CONFIG),
        "vmamba_small": pretrained_cfg(**CONFIG),
        "vmamba_base": pretrained_cfg(**CONFIG),
    }
)

VMAMBA: dict[str, Any] = {"directions": CROSS, "scattn": None}
DEEP = {**VMAMBA, "depths": (2, 2, 27, 2)}


@register_model
def vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    """VMamba-T: 22M parameters, 82.2 top-1."""
    return create_localvmamba("vmamba_tiny", pretrained, **{**VMAMBA, **kwargs})


@register_model
def vmamba_small(pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    """VMamba-S: 44M parameters, 83.5 top-1."""
    return create_localvmamba("vmamba_small", pretrained, **{**DEEP, **kwargs})


@register_model
def vmamba_base(pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    """VMamba-B: 75M parameters, 83.7 top-1."""
    arguments = {**DEEP, "embed_dims": (128, 256, 512, 1024)}
    return create_localvmamba("vmamba_base", pretrained, **{**arguments, **kwargs})
