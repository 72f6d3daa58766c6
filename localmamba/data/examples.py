"""Labeled images and data sets."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count
from typing import Protocol, Self

import numpy as np
from PIL import Image

from localmamba.data.images import Encoded, UnreadableImageError, open_image


class ImageStore(Protocol):
    """Image files in another file."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Encoded: ...

    def name(self, index: int) -> str:
        """Returns the name of an image, without reading it."""
        ...

    def subset(self, indices: Sequence[int] | np.ndarray) -> Self:
        """Selects images by index, in the given order."""
        ...


@dataclass(frozen=True)
class Examples:
    """Labeled images, in memory or read from files on access.

    Attributes:
        images: uint8 [n, H, W] (gray), n paths, or a store of n files.
        labels: int64 [n].
    """

    images: np.ndarray | list[str] | ImageStore
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
        if isinstance(self.images, np.ndarray):
            return str(index)
        return self.images[index] if isinstance(self.images, list) else self.images.name(index)

    def subset(self, indices: Sequence[int] | np.ndarray) -> "Examples":
        """Selects examples by index, in the given order."""
        images = self.images
        if isinstance(images, np.ndarray):
            return Examples(images[indices], self.labels[indices])
        if isinstance(images, list):
            return Examples([images[i] for i in indices], self.labels[indices])
        return Examples(images.subset(indices), self.labels[indices])

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
