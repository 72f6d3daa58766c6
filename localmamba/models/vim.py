"""Vim, which LocalVim builds on, registered in timm.

Source: Vision Mamba, https://arxiv.org/abs/2401.09417. First form: rotary embedding, mean pooling,
both directions added. Later form (`midcls`): class token in the middle, both directions averaged.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model

from .base import pretrained_cfg
from .localvim import LocalVim, create_localvim

PAPER: dict[str, Any] = {
    "paper_ids": "arXiv:2401.09417",
    "paper_name": "Vision Mamba: Efficient Visual Representation Learning with Bidirectional SSM",
    "origin_url": "https://github.com/hustvl/Vim",
}

default_cfgs = generate_default_cfgs(
    {
        "vim_tiny": pretrained_cfg(**PAPER),
        "vim_small": pretrained_cfg(**PAPER),
        "vim_tiny_midcls": pretrained_cfg(**PAPER),
        "vim_small_midcls": pretrained_cfg(**PAPER),
    }
)

VIM: dict[str, Any] = {"depth": 24, "directions": ("h", "h_flip"), "scattn": None}
MIDCLS = {**VIM, "class_token": True, "global_pool": "token", "merge": "mean"}


@register_model
def vim_tiny(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """Vim-Ti as first published: 7M parameters, 73.1 top-1."""
    return create_localvim("vim_tiny", pretrained, **{**VIM, **kwargs})


@register_model
def vim_small(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """Vim-S as first published: 26M parameters, 80.3 top-1."""
    return create_localvim("vim_small", pretrained, **{**VIM, "embed_dim": 384, **kwargs})


@register_model
def vim_tiny_midcls(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """Vim-Ti, later form: 76.1 top-1."""
    return create_localvim("vim_tiny_midcls", pretrained, **{**MIDCLS, **kwargs})


@register_model
def vim_small_midcls(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """Vim-S, later form."""
    return create_localvim("vim_small_midcls", pretrained, **{**MIDCLS, "embed_dim": 384, **kwargs})
