"""All directions on a part of the channels (PC-DARTS)."""

from collections.abc import Sequence

from torch import Tensor, nn

from ..strategy import AlternatingStrategy, SearchSettings, register_strategy


@register_strategy("partial_channels")
class PartialChannels(AlternatingStrategy):
    """Runs every direction on one in `partial` channels; alpha learns from held-out images.

    Xu et al., "PC-DARTS", ICLR 2020 (https://arxiv.org/abs/1907.05737), section 3.2: memory and
    time of the directions shrink by that factor, and a choice made on few channels is less biased.
    As there, alpha has images of its own, is frozen in the first part of the training, and K = 4.
    Left out: the channel shuffle, since a linear layer over all channels precedes and follows; the
    edge normalization, since a block has one edge.
    """

    reusable = False  # the directions' parameters are those of fewer channels
    betas = (0.5, 0.999)
    weight_decay = 1e-3

    def __init__(self, model: nn.Module, settings: SearchSettings, seed: int):
        super().__init__(model, settings, seed)
        for mixer in self.mixers:
            mixer.partial_channels(settings.partial)

    def start_choice_pass(self, progress: float) -> list[Tensor]:
        if progress < self.settings.choice_warmup:
            return []
        return [alpha.requires_grad_() for alpha in self.alphas]

    def finish_choice_pass(self, gradients: Sequence[Tensor]) -> None:
        for alpha in self.alphas:
            alpha.requires_grad_(False)
        self.step(gradients)
