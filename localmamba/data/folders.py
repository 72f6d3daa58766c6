"""Folders of images by class."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from localmamba.data.examples import Examples, Source
from localmamba.data.imagenet import group_val_images
from localmamba.data.splits import SPLIT_NAMES, join_names, split_whole

IMAGE_SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")
)


def load_folder(
    folder: Path, held_out: float, split_seed: int, classes: Sequence[str] | None = None
) -> Source:
    """Loads a folder of images.

    Args:
        folder: Either train/ with val/ (also validation/, valid/) or test/, each with a folder per
            class; or the class folders themselves, which are split here and also kept whole as
            the split `all`. Images may be at any depth of a class folder. val/ may be ImageNet's:
            images without class folders, and their labels beside it (see `group_val_images`).
        held_out: Fraction of each class held out if there is neither val/ nor test/.
        split_seed: Seed of that split.
        classes: Class names in label order; by default the folder names, sorted.

    Raises:
        ValueError: If there are no class folders, one is empty or not in `classes`, or, without
            `classes`, those of two splits differ.
    """
    roots = _split_roots(folder) or {"all": folder}
    files = {split: list_images(root) for split, root in roots.items()}
    if "train" in roots and "val" not in roots and (val := _flat_folder(folder)) is not None:
        roots["val"], files["val"] = val, group_val_images(folder, val)
    if classes is None:
        _check_equal_classes(folder, files)
    classes = tuple(classes or sorted(next(iter(files.values()))))
    splits = {split: _label_files(roots[split], files[split], classes) for split in roots}
    splits = split_whole(splits, held_out, split_seed)
    return Source(str(folder.resolve()), classes, 3, splits)


def list_images(root: Path) -> dict[str, list[str]]:
    """Lists the image files of every class folder in `root`, sorted.

    Raises:
        ValueError: If there are no class folders, or a class has no images.
    """
    names = _class_folders(root)
    if not names:
        raise ValueError(f"{root} has no class folders; it must have a folder for each class")
    files = {name: _list_files(root / name) for name in names}
    if empty := [name for name, paths in files.items() if not paths]:
        raise ValueError(
            f"class folder {root / empty[0]} has no images ({len(empty)} of {len(names)} class "
            f"folders are empty); allowed: {' '.join(sorted(IMAGE_SUFFIXES))}"
        )
    return files


def _split_roots(folder: Path) -> dict[str, Path]:
    # A class may be called `train` too: a split folder has class folders, a class folder images.
    found = {
        split: [folder / name for name in names if (folder / name).is_dir()]
        for split, names in SPLIT_NAMES.items()
    }
    roots = {split: [f for f in folders if _class_folders(f)] for split, folders in found.items()}
    return {split: folders[0] for split, folders in roots.items() if folders}


def _flat_folder(folder: Path) -> Path | None:
    """Returns the validation folder if it holds images."""
    roots = [folder / name for name in SPLIT_NAMES["val"] if (folder / name).is_dir()]
    return next((root for root in roots if _list_files(root)), None)


def _class_folders(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _list_files(folder: Path) -> list[str]:
    paths = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                paths.append(os.path.join(parent, name))
    return sorted(paths)


def _check_equal_classes(folder: Path, files: dict[str, dict[str, list[str]]]) -> None:
    (first, expected), *others = files.items()
    for split, found in others:
        lacks = {
            first: sorted(set(found) - set(expected)),
            split: sorted(set(expected) - set(found)),
        }
        if faults := [
            f"{name} lacks {join_names(names)}" for name, names in lacks.items() if names
        ]:
            raise ValueError(f"class folders in {folder} differ: {'; '.join(faults)}")


def _label_files(root: Path, files: dict[str, list[str]], classes: tuple[str, ...]) -> Examples:
    if foreign := sorted(set(files) - set(classes)):
        raise ValueError(
            f"{root} has classes that the model was not trained on: {join_names(foreign)}; "
            f"known: {join_names(classes)}"
        )
    pairs = [(path, i) for i, name in enumerate(classes) for path in files.get(name, ())]
    return Examples([path for path, _ in pairs], np.array([i for _, i in pairs], dtype=np.int64))
