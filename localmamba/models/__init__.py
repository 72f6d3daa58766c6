"""Models, registered in timm: LocalVim, LocalVMamba, Vim, VMamba."""

from . import vim, vmamba  # noqa: F401 - registers the models
from .backbone import DenseBackbone, create_backbone, load_released
from .directions import resolve_directions, searched_directions
from .loading import load
from .localvim import LocalVim
from .localvmamba import LocalVMamba

__all__ = [
    "DenseBackbone",
    "LocalVMamba",
    "LocalVim",
    "create_backbone",
    "load",
    "load_released",
    "resolve_directions",
    "searched_directions",
]
