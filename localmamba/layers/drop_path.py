"""Stochastic depth whose factors another layer applies."""

import timm.layers
from torch import Tensor


class DropPath(timm.layers.DropPath):
    """timm's, which can also give its factors to a kernel that multiplies by them on its way.

    Args:
        drop_prob: Rate at which an image is dropped.
        scale_by_keep: Whether what is kept grows, so that the mean stays.
    """

    def factors(self, like: Tensor) -> Tensor | None:
        """What to multiply each image by, drawn anew; `self(x)` is x times such factors.

        Args:
            like: A tensor [B, ...] whose device and dtype the factors have.

        Returns:
            [B]; None where nothing is dropped, as in evaluation.
        """
        if self.drop_prob == 0.0 or not self.training:
            return None
        keep = 1.0 - self.drop_prob
        drawn = like.new_empty(like.shape[0]).bernoulli_(keep)
        return drawn.div_(keep) if keep > 0.0 and self.scale_by_keep else drawn
