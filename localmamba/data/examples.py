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
"""What Pillow raises on files that are no images or cut short."""


@dataclass(frozen=True)
class Examples:
    """Labelled images, held in memory or read when asked for.

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
        """The image of one example.

        Raises:
            ValueError: If its file cannot be read.
        """
        item = self.images[index]
        return open_image(item) if isinstance(item, str) else Image.fromarray(item)

    def subset(self, indices: Sequence[int] | np.ndarray) -> "Examples":
        """The examples of these indices, in their order."""
        images = self.images
        chosen = images[indices] if isinstance(images, np.ndarray) else [images[i] for i in indices]
        return Examples(chosen, self.labels[indices])

    def checked(self, bad_images: Literal["error", "skip", "unchecked"]) -> "Examples":
        """The examples whose files can be read.

        Every file is decoded once, so that a bad one is found before training, not hours into it.

        Args:
            bad_images: `error`, `skip` (with a warning that counts and names them) or `unchecked`.

        Raises:
            ValueError: If `error` and a file cannot be read, or if none can.
        """
        if self.in_memory or bad_images == "unchecked":
            return self
        with ThreadPoolExecutor(min(16, cpu_count() or 1)) as pool:
            good = np.fromiter(pool.map(_decodes, self.images), dtype=bool, count=len(self))
        bad = [self.images[i] for i in np.flatnonzero(~good)]
        if not bad:
            return self
        names = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "")
        what = f"{len(bad)} of {len(self)} files are no images or cut short: {names}"
        if bad_images == "error" or not good.any():
            raise ValueError(f"{what}; remove them, or leave them out with --bad_images skip")
        warnings.warn(f"left out: {what}", stacklevel=2)
        return self.subset(np.flatnonzero(good))


@dataclass(frozen=True)
class Source:
    """A data set.

    Attributes:
        name: Its name, or the folder's absolute path.
        classes: Class names, in the order of the labels.
        channels: 1 (grey) or 3 (RGB).
        splits: Some of `train`, `val` (looked at while training), `test` and, of a folder that is
            not split, `all`.
    """

    name: str
    classes: tuple[str, ...]
    channels: int
    splits: dict[str, Examples]

    def split(self, name: str) -> Examples:
        """One split; ValueError if there is none of that name."""
        if name not in self.splits:
            raise ValueError(f"{self.name} has no split {name!r}; it has: {', '.join(self.splits)}")
        return self.splits[name]

    @property
    def watched(self) -> str:
        """The split looked at while training: `val`, or `test` where there is no other."""
        return "val" if "val" in self.splits else "test"

    @property
    def final(self) -> str:
        """The split of the final figures: `test`, or `val` where there is no other."""
        return "test" if "test" in self.splits else "val"


def open_image(path: str | Path) -> Image.Image:
    """Reads an image file whole.

    Raises:
        ValueError: If it is missing, no image, or cut short.
    """
    try:
        with Image.open(path) as image:
            image.load()
    except FileNotFoundError:
        raise ValueError(f"no such file: {path}") from None
    except UNREADABLE:
        raise ValueError(f"cannot read {path}: it is no image, or cut short") from None
    return image


def stratified_split(
    labels: np.ndarray, held_out: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Splits examples class by class.

    Args:
        labels: int [n].
        held_out: Share of every class that goes to the second part; at least one example of a class
            that has two or more.
        seed: Of the choice; the same seed gives the same split anywhere.

    Returns:
        Sorted indices of the two parts.
    """
    generator = np.random.default_rng(seed)
    parts = []
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        count = min(max(1, round(held_out * len(members))), len(members) - 1)
        parts.append(members[:count])
    second = np.sort(np.concatenate(parts))
    return np.setdiff1d(np.arange(len(labels)), second), second


def _decodes(path: str) -> bool:
    try:
        with Image.open(path) as image:
            # JPEG decodes several times faster at an eighth of the size, and still to the end.
            image.draft("RGB", (image.width // 8, image.height // 8))
            image.load()
    except UNREADABLE:
        return False
    return True
