"""The paper's search: a softmax over all directions, trained with the weights."""

from ..strategy import Strategy, register_strategy


@register_strategy("softmax")
class Softmax(Strategy):
    """Runs every direction and trains alpha together with the weights (the paper's search).

    LocalMamba, https://arxiv.org/abs/2403.09338, section 4.2, after DARTS (Liu et al., ICLR 2019)
    without its second set of images: one optimizer, the same batches. Each layer keeps its
    likeliest directions. Memory grows with the number of candidates.
    """
