"""Arms and sizes of the study."""

from dataclasses import dataclass

import numpy as np

from localmamba.models import searched_directions
from localmamba.ops import CANDIDATES

KEEP = 4


@dataclass(frozen=True)
class Setup:
    """Sizes shared by all runs.

    Attributes:
        depth: Number of blocks.
        width: Number of channels C.
        states: Number of states N per channel; 16 as in the paper.
        patch: Side of a patch; 2 gives the paper's grid of 14 x 14 tokens.
        batch: Number of images per step.
        epochs: Epochs of every training.
        search_epochs: Epochs of every search.
        lr: Maximum learning rate: linear warm-up over a tenth of the steps, then cosine decay.
        weight_decay: Weight decay of AdamW.
        label_smoothing: Label smoothing in training.
        images: Number of training images used, of 60,000.
        population: Population of the evolutionary search of single_path.
        generations: Generations of the same.
        cost_batch: Number of images per step when measuring cost, large enough that the GPU and
            not Python limits the speed.
    """

    depth: int = 6
    width: int = 64
    states: int = 16
    patch: int = 2
    batch: int = 256
    epochs: int = 5
    search_epochs: int = 4
    lr: float = 3e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    images: int = 60_000
    population: int = 16
    generations: int = 6
    cost_batch: int = 1024


@dataclass(frozen=True)
class Arm:
    """A configuration to compare.

    Attributes:
        name: Name in the results.
        label: Label in tables.
        scattn: SCAttn variant of the model.
        directions: Directions of every block; empty if blocks differ.
        search: Strategy that searches the directions, if any.
    """

    name: str
    label: str
    scattn: str = "channel"
    directions: tuple[str, ...] = ()
    search: str | None = None

    def table(self, setup: Setup, seed: int, found: list[list[str]] | None) -> list[list[str]]:
        """Returns the directions of each block.

        Args:
            setup: Sizes of the study.
            seed: Seed of the run; determines a random choice.
            found: Result of this seed's search, for an arm that needs it.
        """
        if self.directions:
            return [list(self.directions)] * setup.depth
        if self.search is not None:
            assert found is not None
            return found
        return released(setup.depth) if self.name == "released" else random(setup.depth, seed)


def random(depth: int, seed: int) -> list[list[str]]:
    """Samples four of the paper's eight directions for each block."""
    draw = np.random.default_rng([seed, depth])
    rows = [np.sort(draw.choice(len(CANDIDATES), KEEP, replace=False)) for _ in range(depth)]
    return [[CANDIDATES[i] for i in row] for row in rows]


def released(depth: int) -> list[list[str]]:
    """Returns the released directions of LocalVim's 20 blocks at `depth` evenly spaced blocks."""
    table = searched_directions("localvim_tiny")
    return [table[i] for i in np.linspace(0, len(table) - 1, depth).round().astype(int)]


ROWS = ("h", "h_flip", "h", "h_flip")
LOCAL = ("w2", "w2_flip", "w7", "w7_flip")
BOTH = ("h", "h_flip", "w2", "w2_flip")

ARMS = (
    Arm("rows", "rows only", "none", ROWS),
    Arm("local", "windows only, 2 x 2 and 7 x 7", "none", LOCAL),
    Arm("both", "rows and 2 x 2 windows", "none", BOTH),
    Arm("both_channel", "rows and 2 x 2 windows, SCAttn `channel`", "channel", BOTH),
    Arm(
        "both_spatial", "rows and 2 x 2 windows, SCAttn `channel+spatial`", "channel+spatial", BOTH
    ),
    Arm("searched", "searched (the paper's search)", search="softmax"),
    Arm("random", "a random four in each block"),
    Arm("all", "all eight (twice the branches)", "channel", CANDIDATES),
    Arm("released", "the released table, blocks at even steps"),
    Arm("rows_channel", "rows only, SCAttn `channel`", "channel", ROWS),
    Arm("searched_single_path", "searched (single path)", search="single_path"),
    Arm("searched_binary_gates", "searched (binary gates)", search="binary_gates"),
    Arm("searched_partial_channels", "searched (partial channels)", search="partial_channels"),
)
"""The first three arms have no SCAttn; the others have `channel` unless stated."""

BASELINE = ARMS[0]
