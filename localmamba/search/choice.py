"""The result of a search: the directions of every layer, their file, measures of certainty."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import write_atomically
from ..ops import check_directions


@dataclass(frozen=True)
class Choice:
    """The directions that a search keeps, and the settings that led to them.

    `timm.create_model(..., directions=FILE)` takes its file, which is the same for every run with
    the same settings: it holds no times and no paths.

    Attributes:
        model: The supernet's name.
        strategy: A name in `STRATEGIES`.
        candidates: C names.
        directions: Directions that each layer keeps, in the order of the candidates.
        probabilities: [layers, C], each row adds up to 1.
        epoch: Epochs trained so far; below `epochs` the choice is an early look.
        epochs: Epochs of the whole search.
        seed: Seed of the search.
        settings: Other settings of the search.
    """

    model: str
    strategy: str
    candidates: list[str]
    directions: list[list[str]]
    probabilities: list[list[float]]
    epoch: int
    epochs: int
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Writes the file in one step."""
        write_atomically(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Choice":
        """Reads a file that `save` wrote.

        Raises:
            ValueError: If it is not such a file.
        """
        try:
            content = json.loads(Path(path).read_text())
            choice = cls(**content)
        except (OSError, ValueError, TypeError) as error:
            cause = str(error).removeprefix("Choice.__init__() ")
            raise ValueError(f"{path} is not a directions file of a search: {cause}") from None
        for row in [choice.candidates, *choice.directions]:
            check_directions(row)
        return choice


def check_keep(candidates: Sequence[str], keep: int) -> list[str]:
    """Returns the candidates as a list; ValueError if they repeat, are unknown or too few."""
    candidates = check_directions(candidates)
    if len(set(candidates)) < len(candidates):
        raise ValueError(f"candidates must differ, got {' '.join(candidates)}")
    if not 1 <= keep <= len(candidates):
        raise ValueError(f"keep must be 1 to {len(candidates)}, the number of candidates: {keep}")
    return candidates


def top_directions(
    probabilities: Tensor | Sequence[Sequence[float]], candidates: Sequence[str], keep: int
) -> list[list[str]]:
    """Returns the `keep` likeliest candidates of each layer, in the order of the candidates.

    Args:
        probabilities: [layers, C].
        candidates: C names.
        keep: Directions of a layer. Of equal ones, the earlier candidate is kept.
    """
    scores = torch.as_tensor(probabilities, dtype=torch.float64)
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :keep]
    return [[candidates[i] for i in sorted(row)] for row in order.tolist()]


def entropy(probabilities: Tensor | Sequence[Sequence[float]]) -> list[float]:
    """Returns the normalized entropy of each layer's probabilities, 0 (decided) to 1 (uniform)."""
    p = torch.as_tensor(probabilities, dtype=torch.float64)
    if p.shape[1] == 1:
        return [0.0] * p.shape[0]
    return (torch.special.entr(p).sum(1) / math.log(p.shape[1])).tolist()


def agreement(tables: Sequence[Sequence[Sequence[str]]]) -> float:
    """Returns the share of a layer's directions that two searches have in common, on average.

    Args:
        tables: The directions of two or more searches, with the same layers.

    Returns:
        The mean over layers and pairs of searches, 1 if all agree. Searches that pick k of C
        directions at random come to k / C.

    Raises:
        ValueError: If there are fewer than two searches or their layers differ in number.
    """
    if len(tables) < 2 or len({len(table) for table in tables}) > 1:
        raise ValueError("agreement needs two or more searches with the same number of layers")
    shares = [
        len(set(a) & set(b)) / max(len(a), len(b))
        for one, other in combinations(tables, 2)
        for a, b in zip(one, other, strict=True)
    ]
    return sum(shares) / len(shares)
