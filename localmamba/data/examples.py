"""Labeled images and data sets."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count

import numpy as np
from PIL import Image

from localmamba.data.images import UnreadableImageError, open_image


@dataclass(frozen=True)
class Examples:
    """Labeled images, in memory or read from files on access.

    Attributes:
        images: uint8 [n, H, W] (gray), or n paths.
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

    def image(self, index: int, min_side: int | None = None) -> Image.Image:
        """Returns one image; arguments and errors as those of `open_image`."""
        if isinstance(self.images, np.ndarray):
            return Image.fromarray(self.images[index])
        return open_image(self.images[index], min_side)

    def name(self, index: int) -> str:
        """Returns the path of an image, or its index where it has none."""
        return str(index if isinstance(self.images, np.ndarray) else self.images[index])

    def subset(self, indices: Sequence[int] | np.ndarray) -> "Examples":
        """Selects examples by index, in the given order."""
        images = self.images
        chosen = images[indices] if isinstance(images, np.ndarray) else [images[i] for i in indices]
        return Examples(chosen, self.labels[indices])

    def faults(self) -> dict[int, str]:
        """Decodes every file; returns what `open_image` said of those that cannot be, by index."""
        if self.in_memory:
            return {}
        # Decoding releases the global interpreter lock.
        with ThreadPoolExecutor(min(16, cpu_count() or 1)) as pool:
            found = pool.map(self._fault, range(len(self)))
            return {i: fault for i, fault in enumerate(found) if fault is not None}

    def _fault(self, index: int) -> str | None:
        try:
            # JPEG decodes the whole file several times faster at an eighth of the size.
            self.image(index, min_side=1)
        except UnreadableImageError as error:
            return str(error)
        return None


@dataclass(frozen=True)
class Source:
    """A data set.

    Attributes:
        name: Name, or absolute path of the folder.
        classes: Class names, in label order.
        channels: 1 (gray) or 3 (RGB).
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
