"""Search for the scan directions of every layer: supernets, strategies and their choices."""

from .choice import Choice, agreement, check_keep, entropy, top_directions
from .mixers import SupernetLocalVimMixer, SupernetMixer, SupernetSS2D
from .strategies import DEFAULT_STRATEGY
from .strategy import (
    STRATEGIES,
    SearchSettings,
    Strategy,
    find_strategy,
    make_strategy,
    register_strategy,
    search_step,
)
from .supernet import find_mixers, make_supernet, start_from_supernet

__all__ = [
    "DEFAULT_STRATEGY",
    "STRATEGIES",
    "Choice",
    "SearchSettings",
    "Strategy",
    "SupernetLocalVimMixer",
    "SupernetMixer",
    "SupernetSS2D",
    "agreement",
    "check_keep",
    "entropy",
    "find_mixers",
    "find_strategy",
    "make_strategy",
    "make_supernet",
    "register_strategy",
    "search_step",
    "start_from_supernet",
    "top_directions",
]
