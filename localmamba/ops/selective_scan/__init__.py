"""The selective scan (S6), alone and with the projections of a block's branches."""

from .branches import s6_branches
from .op import selective_scan

__all__ = ["s6_branches", "selective_scan"]
