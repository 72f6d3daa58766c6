"""Layers: S6 branches, SCAttn, the two mixers, blocks. Each is usable alone."""

from .blocks import DropPath, LocalVimBlock, LocalVMambaBlock
from .local_vim_mixer import LocalVimMixer
from .mixer import DirectionalMixer
from .norm import LayerNorm, RMSNorm
from .patches import PatchEmbed, PatchMerging
from .position import AxialRotary, resize_table
from .s6 import S6Branches
from .scattn import SCAttn
from .ss2d import SS2D

__all__ = [
    "SS2D",
    "AxialRotary",
    "DirectionalMixer",
    "DropPath",
    "LayerNorm",
    "LocalVMambaBlock",
    "LocalVimBlock",
    "LocalVimMixer",
    "PatchEmbed",
    "PatchMerging",
    "RMSNorm",
    "S6Branches",
    "SCAttn",
    "resize_table",
]
