"""Image files: decoding of every kind to 8 bits, one error for what cannot be decoded."""

import os
import struct
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from io import BytesIO
from math import ceil, sqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

MAX_ASPECT = 256
"""Longer side over shorter side, at most: resizing the shorter side to the model's size would
otherwise need any amount of memory."""

MAX_FILE = 2**29
"""Bytes of an image file, at most."""

BITS_PER_SAMPLE = 258
"""TIFF tag."""


class Encoded(NamedTuple):
    """An image file held in memory.

    Attributes:
        name: Name for messages.
        content: The bytes of the file.
    """

    name: str
    content: bytes


class UnreadableImageError(ValueError):
    """An image that cannot be read; names the file and the cause in one line."""


def open_image(file: str | Path | Encoded, min_side: int | None = None) -> Image.Image:
    """Reads an image as 8-bit gray (mode L) or RGB.

    Takes the first frame or page and turns it as EXIF says. Alpha is dropped. Integer gray of 16
    bits (12 in a TIFF that says so) is scaled by its range, float gray from 0..1.

    Args:
        file: Path or content.
        min_side: Allows a JPEG to be decoded at 1/2, 1/4 or 1/8 of its size while both sides keep
            so many pixels, which is quicker.

    Raises:
        UnreadableImageError: If it is missing or cannot be decoded.
    """
    # By module and idempotent: a data set of odd files would print thousands of lines.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    name = file.name if isinstance(file, Encoded) else str(file)
    if not isinstance(file, Encoded) and not os.path.isfile(file):
        # A named pipe would block.
        exists = os.path.exists(file)
        raise UnreadableImageError(
            f"cannot read {name}: not a file" if exists else f"no such file: {name}"
        )
    try:
        size = len(file.content) if isinstance(file, Encoded) else os.path.getsize(file)
        if not 0 < size <= MAX_FILE:
            raise ValueError(f"{size} bytes; allowed: {MAX_FILE}" if size else "the file is empty")
        with Image.open(BytesIO(file.content) if isinstance(file, Encoded) else file) as image:
            if image.format == "EPS":
                raise ValueError("EPS, which would run Ghostscript")
            if min_side is not None:
                image.draft(None, (min_side, min_side))
            image.load()
            if max(image.size) > MAX_ASPECT * min(image.size):
                width, height = image.size
                raise ValueError(
                    f"{width} x {height} pixels; a side may be {MAX_ASPECT} times the other at most"
                )
            bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))[0]
            with suppress(Exception):  # damaged EXIF data; the pixels are there
                ImageOps.exif_transpose(image, in_place=True)
            return _to_8_bits(image, min(bits, 16))
    # Pillow raises nearly everything: struct.error, IndexError, SyntaxError, MemoryError, ...
    except Exception as error:
        raise UnreadableImageError(f"cannot read {name}: {_cause(error)}") from None


def _to_8_bits(image: Image.Image, bits: int) -> Image.Image:
    """Converts to L or RGB; integer gray has so many bits."""
    mode = image.mode
    if mode in ("L", "RGB"):
        return image
    if mode.startswith("I"):
        return _scale(image, 2**bits - 1)
    if mode == "F":
        return _scale(image, 1)
    if mode == "LAB":
        return _lab_to_rgb().apply(image)
    if mode in ("La", "RGBa"):  # alpha is multiplied in
        image = image.convert("LA" if mode == "La" else "RGBA")
    if mode in ("1", "LA", "La"):
        return image.convert("L")
    if mode == "PA" or "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _scale(image: Image.Image, maximum: int) -> Image.Image:
    values = np.asarray(image)
    low, high = values.min(), values.max()
    # Never scaled by the image's own range: the same gray must look the same in every image.
    if not 0 <= low <= high <= maximum:
        kind = "float" if image.mode == "F" else "integer"
        raise ValueError(f"{kind} gray from {low:g} to {high:g}; allowed: 0 to {maximum}")
    return Image.fromarray(np.round(values * (255 / maximum)).astype(np.uint8))


@cache
def _lab_to_rgb() -> ImageCms.ImageCmsTransform:
    lab, rgb = (ImageCms.createProfile(space) for space in ("LAB", "sRGB"))
    return ImageCms.buildTransform(lab, rgb, "LAB", "RGB")


def _cause(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or a damaged header"
    if isinstance(error, Image.DecompressionBombError):
        # "Image size (N pixels) exceeds limit of M pixels, could be ..."
        found = str(error).partition(", could be")[0]
        return f"{found}; scale the image down"
    if isinstance(error, MemoryError):
        return "not enough memory"
    if isinstance(error, PermissionError):
        return "permission denied"
    text = " ".join(str(error).split())
    kind = "damaged" if isinstance(error, (struct.error, LookupError, TypeError)) else ""
    return ": ".join(filter(None, [kind, text])) or f"damaged ({type(error).__name__})"


def draft_side(size: int, crop_scale: Sequence[float], crop_ratio: Sequence[float]) -> int:
    """Returns the `min_side` with which the smallest random crop still has `size` pixels a side.

    Args:
        size: Side of the model's input.
        crop_scale: Minimum and maximum area of the crop, as fractions.
        crop_ratio: Minimum and maximum aspect ratio of the crop.
    """
    return ceil(size / sqrt(crop_scale[0] * min(crop_ratio[0], 1 / crop_ratio[1])))
