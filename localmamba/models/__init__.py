"""Models, registered in timm: LocalVim, LocalVMamba, Vim, VMamba."""

from . import localvim, localvmamba, vim, vmamba  # noqa: F401 - registers the models
from .backbone import DenseBackbone, create_backbone
from .directions import resolve_directions, searched_directions
from .hierarchical import LocalVMamba
from .plain import LocalVim
from .released import load_released

__all__ = [
    "DenseBackbone",
    "LocalVMamba",
    "LocalVim",
    "create_backbone",
    "load_released",
    "resolve_directions",
    "searched_directions",
]
