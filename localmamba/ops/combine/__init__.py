"""Combination of a block's directions: SCAttn's pooling and weights, weighted sum, norm, gate."""

from .op import combine_directions, pool_directions, scattn_combine

__all__ = ["combine_directions", "pool_directions", "scattn_combine"]
