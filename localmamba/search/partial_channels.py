"""All directions run, on a part of the channels."""

from collections.abc import Sequence

from torch import Tensor, nn

from .strategy import AlternatingStrategy, SearchSettings


class PartialChannels(AlternatingStrategy):
    """One in `partial` inner channels passes the mixture of directions; the others go round it.

    Xu et al., "PC-DARTS", ICLR 2020 (https://arxiv.org/abs/1907.05737), section 3.2: memory and
    time of the directions shrink by that factor, and choosing by few channels is less biased. As
    there, alpha has images of its own, rests in the first part of the training, and K = 4. The
    channel shuffle of that paper has nothing to do here: a linear layer over all channels follows,
    and one precedes. Its edge normalisation neither: a block has one edge.
    """

    name = "partial_channels"
    reusable = False  # the directions' parameters are those of fewer channels
    betas = (0.5, 0.999)
    weight_decay = 1e-3

    def __init__(self, model: nn.Module, settings: SearchSettings, seed: int):
        super().__init__(model, settings, seed)
        for mixer in self.mixers:
            mixer.narrow(settings.partial)

    def start_choice_pass(self, progress: float) -> list[Tensor]:
        if progress < self.settings.choice_warmup:
            return []
        return [alpha.requires_grad_() for alpha in self.alphas]

    def finish_choice_pass(self, gradients: Sequence[Tensor]) -> None:
        for alpha in self.alphas:
            alpha.requires_grad_(False)
        self.step(gradients)
