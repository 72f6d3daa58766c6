"""Visual state space models: scan orders, selective scan, LocalMamba, Vim, VMamba.

Importing this package registers its models in timm: `timm.create_model("localvim_tiny")`.
"""

from . import layers, models, ops
from .layers import SS2D, LocalVimMixer, SCAttn
from .models import LocalVim, LocalVMamba, searched_directions

__all__ = [
    "SS2D",
    "LocalVMamba",
    "LocalVim",
    "LocalVimMixer",
    "SCAttn",
    "layers",
    "models",
    "ops",
    "searched_directions",
]
