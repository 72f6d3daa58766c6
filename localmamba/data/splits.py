"""Splits of data sets: by name, by random choice, their classes."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from localmamba.data.examples import Examples

SPLIT_NAMES = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}
"""Names of the splits in folders and file names."""

MAX_CLASSES = 100_000


def group_by_split(paths: Iterable[Path]) -> dict[str, list[Path]]:
    """Groups files that are named after their split, as train-0000.tar; others are of `all`.

    Raises:
        ValueError: If some are and some are not.
    """
    groups: dict[str, list[Path]] = {}
    for path in paths:
        words = set(re.split(r"[^a-z]+", path.stem.lower()))
        found = [split for split, names in SPLIT_NAMES.items() if words & set(names)]
        groups.setdefault(found[0] if found else "all", []).append(path)
    if "all" in groups and len(groups) > 1:
        raise ValueError(
            f"{groups['all'][0]} is not named after a split, others beside it are; allowed: "
            f"{', '.join(name for names in SPLIT_NAMES.values() for name in names)}"
        )
    return {split: groups[split] for split in (*SPLIT_NAMES, "all") if split in groups}


def split_whole(splits: Mapping[str, Examples], held_out: float, seed: int) -> dict[str, Examples]:
    """Adds a held-out split `val` to splits that have none; arguments of `stratified_split`."""
    if "val" in splits or "test" in splits:
        return dict(splits)
    whole = splits["all"] if "all" in splits else splits["train"]
    train, val = stratified_split(whole.labels, held_out, seed)
    return {**splits, "train": whole.subset(train), "val": whole.subset(val)}


def class_names(
    data: str, splits: Mapping[str, Examples], classes: Sequence[str] | None
) -> tuple[str, ...]:
    """Returns the names of labeled classes: those given, or the numbers.

    Raises:
        ValueError: If there are labels without a name, or too many.
    """
    highest = max((int(part.labels.max()) for part in splits.values() if len(part)), default=-1)
    if highest >= (allowed := MAX_CLASSES if classes is None else len(classes)):
        raise ValueError(f"{data} has the label {highest}; allowed: 0 to {allowed - 1}")
    return tuple(map(str, range(highest + 1))) if classes is None else tuple(classes)


def match_labels(
    labels: np.ndarray, own: Sequence[str] | None, classes: Sequence[str] | None, data: str
) -> np.ndarray:
    """Returns labels of a data set as labels of a model.

    Args:
        labels: int64 [n]; -1 for none.
        own: Class names of the data set, in label order. Where it has none, its labels are the
            outputs of the model; if the model's classes are numbers, those with that name.
        classes: Class names of the model, in the order of its outputs.
        data: Name of the data set, for the error.

    Raises:
        ValueError: If there are classes that the model does not know.
    """
    if own is None and classes is not None and all(name.isdecimal() for name in classes):
        own = list(map(str, range(int(labels.max(initial=-1)) + 1)))
    if own is None or classes is None or list(own) == list(classes):
        return labels
    if foreign := sorted({own[i] for i in np.unique(labels[labels >= 0])} - set(classes)):
        raise ValueError(
            f"{data} has classes that the model was not trained on: {join_names(foreign)}; "
            f"known: {join_names(classes)}"
        )
    position = {name: i for i, name in enumerate(classes)}
    # The last entry serves the label -1.
    return np.array([position.get(name, -1) for name in own] + [-1])[labels]


def stratified_split(
    labels: np.ndarray, held_out: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Splits examples class by class.

    Args:
        labels: int [n].
        held_out: Fraction of each class in the second part; minimum one example for a class with
            two or more.
        seed: Random seed; the split depends on nothing else.

    Returns:
        Sorted indices of both parts.
    """
    generator = np.random.default_rng(seed)
    parts = []
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        count = min(max(1, round(held_out * len(members))), len(members) - 1)
        parts.append(members[:count])
    second = np.sort(np.concatenate(parts))
    return np.setdiff1d(np.arange(len(labels)), second), second


def join_names(names: Sequence[str], limit: int = 10) -> str:
    """Lists names, the first ones of many."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
