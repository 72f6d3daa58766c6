"""Search for the scan directions of every layer: ways to train a supernet, and what they choose."""

from torch import nn

from .binary_gates import BinaryGates
from .choice import Choice, agreement, check_keep, entropy, top_directions
from .partial_channels import PartialChannels
from .single_path import SinglePath
from .softmax import Softmax
from .strategy import SearchSettings, Strategy

STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy for strategy in (Softmax, SinglePath, BinaryGates, PartialChannels)
}

__all__ = [
    "STRATEGIES",
    "Choice",
    "SearchSettings",
    "Strategy",
    "agreement",
    "check_keep",
    "entropy",
    "make_strategy",
    "top_directions",
]


def make_strategy(name: str, model: nn.Module, settings: SearchSettings, seed: int = 0) -> Strategy:
    """The strategy of this name for a supernet, see `Strategy`.

    Raises:
        ValueError: If the name is unknown or the model does not fit.
    """
    if name not in STRATEGIES:
        raise ValueError(f"unknown strategy {name!r}; known: {', '.join(STRATEGIES)}")
    return STRATEGIES[name](model, settings, seed)
