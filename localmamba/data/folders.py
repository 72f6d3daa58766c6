"""Folders of images: a folder for each class, image files in it at any depth."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from localmamba.data.examples import Examples, Source, stratified_split

IMAGE_SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")
)
SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}


def load_folder(
    folder: Path, held_out: float, split_seed: int, classes: Sequence[str] | None = None
) -> Source:
    """A folder of images as a data set.

    Args:
        folder: With train/ and val/ (also validation/, valid/) or test/, each holding a folder for
            each class; or holding the class folders itself, which is then split here and also kept
            whole as the split `all`.
        held_out: Share of every class that is held out where there is neither val/ nor test/.
        split_seed: Seed of that split.
        classes: Class names whose order gives the labels; by default those found, sorted.

    Raises:
        ValueError: If there are no class folders, one is empty, or has a name not in `classes`.
    """
    roots = _split_roots(folder) or {"all": folder}
    files = {split: list_images(root) for split, root in roots.items()}
    classes = tuple(classes or sorted(next(iter(files.values()))))
    splits = {split: _examples(roots[split], files[split], classes) for split in roots}
    if "val" not in splits and "test" not in splits:
        whole = splits.get("all") or splits["train"]
        train, val = stratified_split(whole.labels, held_out, split_seed)
        splits |= {"train": whole.subset(train), "val": whole.subset(val)}
    return Source(str(folder.resolve()), classes, 3, splits)


def list_images(root: Path) -> dict[str, list[str]]:
    """The image files of every class.

    Args:
        root: Folder that holds a folder for each class.

    Returns:
        Class name -> sorted paths.

    Raises:
        ValueError: If there are no class folders, or a class has no images.
    """
    names = _class_folders(root)
    if not names:
        raise ValueError(f"{root} holds no class folders; it must hold a folder for each class")
    files = {name: _images_below(root / name) for name in names}
    if empty := [name for name, paths in files.items() if not paths]:
        raise ValueError(
            f"class folder {root / empty[0]} holds no images ({len(empty)} of {len(names)} class "
            f"folders are empty); allowed: {' '.join(sorted(IMAGE_SUFFIXES))}"
        )
    return files


def _split_roots(folder: Path) -> dict[str, Path]:
    roots: dict[str, Path] = {}
    for split, names in SPLIT_FOLDERS.items():
        for name in names:
            # A class may be called `train` too: a split holds folders, a class holds images.
            if (folder / name).is_dir() and _class_folders(folder / name):
                roots.setdefault(split, folder / name)
    return roots


def _class_folders(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images_below(folder: Path) -> list[str]:
    paths = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                paths.append(os.path.join(parent, name))
    return sorted(paths)


def _examples(root: Path, files: dict[str, list[str]], classes: tuple[str, ...]) -> Examples:
    if foreign := sorted(set(files) - set(classes)):
        raise ValueError(
            f"{root} holds classes that the training had not: {_some(foreign)}; known: "
            f"{_some(classes)}"
        )
    paths = [path for name in classes for path in files.get(name, ())]
    labels = [label for label, name in enumerate(classes) for _ in files.get(name, ())]
    return Examples(paths, np.array(labels, dtype=np.int64))


def _some(names: Sequence[str], most: int = 10) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
