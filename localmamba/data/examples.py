"""Labelled images and data sets."""

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""Exceptions that Pillow raises for files that are not images or are truncated."""


@dataclass(frozen=True)
class Examples:
    """Labelled images, in memory or read from files on access.

    Attributes:
        images: uint8 [n, H, W] (grey), or n paths.
        labels: int64 [n].
    """

    images: np.ndarray | list[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def in_memory(self) -> bool:
        """Whether the images are an array."""
        return isinstance(self.images, np.ndarray)

    def image(self, index: int) -> Image.Image:
        """Returns one image; ValueError if its file cannot be read."""
        item = self.images[index]
        return open_image(item) if isinstance(item, str) else Image.fromarray(item)

    def subset(self, indices: Sequence[int] | np.ndarray) -> "Examples":
        """Selects examples by index, in the given order."""
        images = self.images
        chosen = images[indices] if isinstance(images, np.ndarray) else [images[i] for i in indices]
        return Examples(chosen, self.labels[indices])

    def checked(self, bad_images: Literal["error", "skip", "unchecked"]) -> "Examples":
        """Returns the examples whose files can be read.

        Decodes every file once, so that a bad one is found before training and not hours into it.

        Args:
            bad_images: `error`, `skip` (with a warning that counts and names them) or `unchecked`.

        Raises:
            ValueError: If a file cannot be read under `error`, or no file can under `skip`.
        """
        if self.in_memory or bad_images == "unchecked":
            return self
        with ThreadPoolExecutor(min(16, cpu_count() or 1)) as pool:
            good = np.fromiter(pool.map(_is_readable, self.images), dtype=bool, count=len(self))
        bad = [self.images[i] for i in np.flatnonzero(~good)]
        if not bad:
            return self
        names = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "")
        found = f"{len(bad)} of {len(self)} files are not images or are truncated: {names}"
        if bad_images == "error" or not good.any():
            raise ValueError(f"{found}; remove them, or skip them with --bad_images skip")
        warnings.warn(f"skipped {found}", stacklevel=2)
        return self.subset(np.flatnonzero(good))


@dataclass(frozen=True)
class Source:
    """A data set.

    Attributes:
        name: Name, or absolute path of the folder.
        classes: Class names, in label order.
        channels: 1 (grey) or 3 (RGB).
        splits: Some of `train`, `val` (evaluated during training), `test`, and `all` for a folder
            without split folders.
    """

    name: str
    classes: tuple[str, ...]
    channels: int
    splits: dict[str, Examples]

    def split(self, name: str) -> Examples:
        """Returns a split by name; ValueError if there is none."""
        if name not in self.splits:
            raise ValueError(f"{self.name} has no split {name!r}; it has: {', '.join(self.splits)}")
        return self.splits[name]

    @property
    def watched(self) -> str:
        """Name of the split evaluated during training: `val`, else `test`."""
        return "val" if "val" in self.splits else "test"

    @property
    def final(self) -> str:
        """Name of the split for final metrics: `test`, else `val`."""
        return "test" if "test" in self.splits else "val"


def open_image(path: str | Path) -> Image.Image:
    """Reads and decodes an image file.

    Raises:
        ValueError: If it is missing, not an image, or truncated.
    """
    try:
        with Image.open(path) as image:
            image.load()
    except FileNotFoundError:
        raise ValueError(f"no such file: {path}") from None
    except UNREADABLE:
        raise ValueError(f"cannot read {path}: not an image, or truncated") from None
    return image


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


def _is_readable(path: str) -> bool:
    try:
        with Image.open(path) as image:
            # JPEG decodes the whole file several times faster at an eighth of the size.
            image.draft("RGB", (image.width // 8, image.height // 8))
            image.load()
    except UNREADABLE:
        return False
    return True
