"""The paper's search: every direction runs, weighed by softmax(alpha)."""

from .strategy import Strategy


class Softmax(Strategy):
    """Weights and alpha learn together, from the same images and with one optimiser.

    LocalMamba, https://arxiv.org/abs/2403.09338, section 4.2, after DARTS (Liu et al., ICLR 2019),
    without its second set of images. Each layer keeps its likeliest directions. Memory grows with
    the number of candidates.
    """

    name = "softmax"
