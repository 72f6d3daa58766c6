"""A model seen as a supernet: its mixers, and which of their directions run."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..layers import DirectionalMixer


def find_mixers(model: nn.Module) -> list[DirectionalMixer]:
    """The mixers of a supernet, in the order of its blocks.

    Raises:
        ValueError: If the model has none, or they do not have the same candidates.
    """
    mixers = [module for module in model.modules() if isinstance(module, DirectionalMixer)]
    if not mixers:
        raise ValueError("a search needs a model of this package: no mixer with directions found")
    if any(mixer.directions != mixers[0].directions for mixer in mixers):
        raise ValueError("a supernet has the same candidate directions in every block")
    return mixers


class Paths:
    """Tells each mixer of a model which branches to run, and with which weights to add them.

    Mixers take both as arguments of `forward`; hooks pass what is set here, so that the model is
    called as always. What is set stays until it is set anew, a backward pass that runs blocks
    again included.

    Args:
        mixers: Of a supernet.
    """

    def __init__(self, mixers: Sequence[DirectionalMixer]):
        self._branches: list[list[int] | None] = [None] * len(mixers)
        self._weights: list[Tensor | None] = [None] * len(mixers)
        for layer, mixer in enumerate(mixers):
            mixer.register_forward_pre_hook(self._hook(layer), with_kwargs=True)

    def _hook(self, layer: int) -> Callable:
        def arguments(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            path = {"branches": self._branches[layer], "weights": self._weights[layer]}
            return args, {**kwargs, **path}

        return arguments

    def set(
        self,
        branches: Sequence[Sequence[int]],
        weights: Sequence[Tensor] | Tensor | None = None,
    ) -> None:
        """Runs these branches of each layer.

        Args:
            branches: For each layer, positions in its directions.
            weights: For each layer what the branches are added with, [K]; None for what the mixer
                does by itself: weights softmax(alpha), or the plain sum if it has no alpha.
        """
        self._branches = [list(row) for row in branches]
        self._weights = [None] * len(self._branches) if weights is None else list(weights)

    def clear(self) -> None:
        """Runs every branch."""
        self._branches = [None] * len(self._branches)
        self._weights = [None] * len(self._weights)


def sample_sets(scores: Tensor, count: int, generator: torch.Generator) -> list[list[int]]:
    """For each layer `count` different branches, one after another, each by softmax of its score.

    The largest of scores with Gumbel noise are such a sample without replacement (Kool et al.,
    "Stochastic Beams and Where to Find Them", ICML 2019). Equal scores give uniform sets.

    Args:
        scores: [layers, C], log-probabilities up to a constant, on the CPU.
        count: Branches of a layer.
        generator: Source of chance, on the CPU.

    Returns:
        [layers][count], in the order drawn.
    """
    noise = -torch.empty(scores.shape).exponential_(generator=generator).log()
    return (scores + noise).topk(count, dim=1).indices.tolist()
