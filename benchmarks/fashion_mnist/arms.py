"""Arms, sizes, trials and records of the study."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from localmamba.ops import CANDIDATES

KEEP = 4
"""Directions of a block, in every arm but `all`."""


@dataclass(frozen=True)
class Setup:
    """Sizes of the trials on a data set.

    Attributes:
        patch: Side of a patch; the grid has 14 x 14 tokens, as the paper's.
        epochs: Epochs of a training.
        batch: Images of a step.
        width: Channels C of the model.
        depth: Blocks of the model.
        search_epochs: Epochs of a search.
        images: Training images used, at most.
        lr: Largest learning rate: linear warm-up over a tenth of the steps, then cosine.
    """

    patch: int
    epochs: int
    batch: int
    width: int = 32
    depth: int = 4
    search_epochs: int = 5
    images: int = 60_000
    lr: float = 3e-3


@dataclass(frozen=True)
class Arm:
    """A configuration to compare.

    Attributes:
        label: Label in tables.
        directions: Directions of every block; empty if blocks differ (`searched`, `random`).
        scattn: SCAttn of the model.
    """

    label: str
    directions: tuple[str, ...] = ()
    scattn: str = "none"


ROWS = ("h", "h_flip", "h", "h_flip")
CROSS = ("h", "h_flip", "v", "v_flip")
WINDOWS = ("w2", "w2_flip", "w7", "w7_flip")
BOTH = ("h", "h_flip", "w2", "w2_flip")

ARMS = {
    "rows": Arm("rows", ROWS),
    "cross": Arm("rows and columns", CROSS),
    "windows": Arm("windows, 2 x 2 and 7 x 7", WINDOWS),
    "both": Arm("rows and windows", BOTH),
    "rows_scattn": Arm("rows, SCAttn", ROWS, "channel"),
    "cross_scattn": Arm("rows and columns, SCAttn", CROSS, "channel"),
    "both_scattn": Arm("rows and windows, SCAttn", BOTH, "channel"),
    "random": Arm("a random four a block, SCAttn", (), "channel"),
    "searched": Arm("searched, SCAttn", (), "channel"),
    "all": Arm("all eight, SCAttn", CANDIDATES, "channel"),
}

SETUPS = {
    "fashion-mnist": Setup(patch=2, epochs=20, batch=256),
    "elpv": Setup(patch=6, epochs=60, batch=64),
}
"""Sizes by data set, which prepare.py writes."""

ARMS_OF = {"fashion-mnist": tuple(ARMS), "elpv": ("rows", "both_scattn")}


def random_directions(depth: int, seed: int) -> list[list[str]]:
    """Samples four of the paper's eight directions for each block."""
    draw = np.random.default_rng([seed, depth])
    rows = [np.sort(draw.choice(len(CANDIDATES), KEEP, replace=False)) for _ in range(depth)]
    return [[CANDIDATES[i] for i in row] for row in rows]


@dataclass(frozen=True)
class Trial:
    """An arm trained once; `searched` with a search of its own before.

    Attributes:
        data: Name of the data set.
        arm: Name of the arm.
        seed: Seed of everything that is random; of the split too, where the data has none.
    """

    data: str
    arm: str
    seed: int


def list_trials(arms: list[str], seeds: int) -> list[Trial]:
    """Lists trials seed by seed, so that those made so far compare all arms, the longest first."""
    return [
        Trial(data, arm, seed)
        for seed in range(seeds)
        for data in SETUPS
        for arm in reversed(ARMS_OF[data])
        if arm in arms
    ]


def read_records(path: Path) -> dict[Trial, dict[str, Any]]:
    """Reads the records of a file, none if it is absent; skips a line that was cut off."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return {Trial(r["data"], r["arm"], r["seed"]): r for r in records}


def as_line(trial: Trial, record: dict[str, Any]) -> str:
    """Returns the line of a record."""
    return json.dumps({**asdict(trial), **record}) + "\n"


def add_record(path: Path, trial: Trial, record: dict[str, Any]) -> None:
    """Appends a record in one write, which processes may do at the same time, and syncs it."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(file, as_line(trial, record).encode())
        os.fsync(file)
    finally:
        os.close(file)
