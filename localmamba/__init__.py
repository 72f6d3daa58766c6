"""Visual state space models: scan orders, selective scan, LocalMamba, Vim, VMamba.

Importing this package registers its models in timm: `timm.create_model("localvim_tiny")`.
"""

from . import layers, models, ops, search
from .layers import SS2D, LocalVimMixer, SCAttn
from .models import (
    DenseBackbone,
    LocalVim,
    LocalVMamba,
    create_backbone,
    load,
    load_released,
    searched_directions,
)

__all__ = [
    "SS2D",
    "DenseBackbone",
    "LocalVMamba",
    "LocalVim",
    "LocalVimMixer",
    "SCAttn",
    "create_backbone",
    "layers",
    "load",
    "load_released",
    "models",
    "ops",
    "search",
    "searched_directions",
]
