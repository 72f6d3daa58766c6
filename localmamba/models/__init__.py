"""Models, registered in timm: LocalVim, LocalVMamba, Vim, VMamba and the supernets."""

from . import localvim, localvmamba, vim, vmamba  # noqa: F401 - registers the models
from .directions import resolve_directions, searched_directions
from .hierarchical import LocalVMamba
from .plain import LocalVim

__all__ = [
    "LocalVMamba",
    "LocalVim",
    "resolve_directions",
    "searched_directions",
]
