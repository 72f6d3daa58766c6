"""What the study compares, and with which sizes."""

from dataclasses import dataclass

import numpy as np

from localmamba.models import searched_directions
from localmamba.ops import CANDIDATES

KEEP = 4


@dataclass(frozen=True)
class Setup:
    """Sizes that all runs share.

    Attributes:
        depth: Blocks.
        width: Channels C.
        states: States N of a channel; 16 as in the paper.
        patch: Side of a patch; 2 gives the paper's grid of 14 x 14 tokens.
        batch: Images in a step.
        epochs: Passes over the training images, of every arm.
        search_epochs: The same, of every search.
        lr: Largest learning rate: linear warm-up over a tenth of the training, then a cosine.
        weight_decay: Of AdamW.
        label_smoothing: In training.
        images: Training images that are used; 60,000 are all.
        population: Of the evolution of single_path.
        generations: Of the same.
        cost_batch: Images in a step whose time and memory are measured: so many that the GPU has
            more to do than Python, which prepares its work.
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
    """One thing that is compared.

    Attributes:
        name: In results.
        label: In tables.
        scattn: Of the model.
        directions: Of every block; empty where they differ from block to block.
        search: The strategy that finds them, if any.
    """

    name: str
    label: str
    scattn: str = "channel"
    directions: tuple[str, ...] = ()
    search: str | None = None

    def table(self, setup: Setup, seed: int, found: list[list[str]] | None) -> list[list[str]]:
        """The directions of each block.

        Args:
            setup: Sizes.
            seed: Of the run; decides a random choice.
            found: What the search of this seed found, for an arm that needs it.
        """
        if self.directions:
            return [list(self.directions)] * setup.depth
        if self.search is not None:
            assert found is not None
            return found
        return released(setup.depth) if self.name == "released" else random(setup.depth, seed)


def random(depth: int, seed: int) -> list[list[str]]:
    """Four of the paper's eight directions for each block, drawn anew for each seed."""
    draw = np.random.default_rng([seed, depth])
    rows = [np.sort(draw.choice(len(CANDIDATES), KEEP, replace=False)) for _ in range(depth)]
    return [[CANDIDATES[i] for i in row] for row in rows]


def released(depth: int) -> list[list[str]]:
    """The released directions of LocalVim's 20 blocks, taken at `depth` even steps."""
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
"""The arms after the first three have SCAttn, `channel` where nothing else is said."""

BASELINE = ARMS[0]
