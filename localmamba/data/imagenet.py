"""ImageNet's validation images as they are distributed: one folder, labels in a file beside it."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from localmamba.data.splits import join_names

KAGGLE = "LOC_val_solution.csv"
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
META = "meta.mat"
DEVKIT = Path("ILSVRC2012_devkit_t12/data")

IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG", re.IGNORECASE)
LEVELS = 3
"""Folders above the data's in which labels are looked for; Kaggle's data is ILSVRC/Data/CLS-LOC."""


def group_val_images(folder: Path, val: Path) -> dict[str, list[str]]:
    """Lists the images of every class of a validation folder without class folders.

    Args:
        folder: The data set.
        val: Its folder of images.

    Raises:
        ValueError: If they are not ImageNet's, or their labels are missing.
    """
    files = {int(m[1]): p for p in sorted(val.iterdir()) if (m := IMAGE.fullmatch(p.name))}
    labels = _find_labels(folder, val) if files else None
    if labels is None:
        raise ValueError(
            f"{val} has images but no class folders; allowed: a folder for each class, or "
            f"ImageNet's ILSVRC2012_val_*.JPEG with {KAGGLE}, or {GROUND_TRUTH} and {META} of "
            f"the devkit, beside it"
        )
    if missing := [files[i].name for i in files if i not in labels]:
        raise ValueError(f"{len(missing)} images of {val} have no label: {join_names(missing)}")
    classes: dict[str, list[str]] = {}
    for number, path in files.items():
        classes.setdefault(labels[number], []).append(str(path))
    return classes


def _find_labels(folder: Path, val: Path) -> dict[int, str] | None:
    """Returns the class (WordNet id) of every image by number, if a file of them is found."""
    for place in (val, folder, *list(folder.resolve().parents)[:LEVELS]):
        if (place / KAGGLE).is_file():
            return dict(_read_kaggle(place / KAGGLE))
        for devkit in (place, place / DEVKIT):
            if (devkit / GROUND_TRUTH).is_file() and (devkit / META).is_file():
                return _read_devkit(devkit)
    return None


def _read_kaggle(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(newline="") as file:
        for row in csv.reader(file):
            # ILSVRC2012_val_00048981,n03995372 85 1 499 272
            if len(row) == 2 and (found := IMAGE.fullmatch(row[0] + ".JPEG")) and row[1].strip():
                yield int(found[1]), row[1].split()[0]


def _read_devkit(folder: Path) -> dict[int, str]:
    from scipy.io import loadmat

    try:
        synsets = loadmat(folder / META, squeeze_me=True)["synsets"]
        names = {int(row[0]): str(row[1]) for row in synsets}
        numbers = (folder / GROUND_TRUTH).read_text().split()
        return {i: names[int(number)] for i, number in enumerate(numbers, start=1)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cannot read the labels of ImageNet in {folder}: {error!r}") from None
