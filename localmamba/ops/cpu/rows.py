"""Rows of tensors, as kernels see them: addresses and strides, rows of contiguous floats."""

from typing import NamedTuple

import torch
from torch import Tensor

from .jit import inline
from .vectors import (
    LANES,
    VECTOR_BYTES,
    lane,
    load_float,
    load_vector,
    splat,
    store_float,
    store_vector,
    with_lane,
)


class Rows(NamedTuple):
    """The rows [b, k, t] of a tensor [B, K, T, *]: where the first is and the way to the next, in bytes.

    Attributes:
        base: Address of the first row; 0 for a tensor that is not there.
        image: From b to b + 1; 0 if the images share their rows.
        direction: From k to k + 1; 0 if the directions share their rows.
        step: From t to t + 1.
    """

    base: int
    image: int
    direction: int
    step: int


NOTHING = Rows(0, 0, 0, 0)


def floats(x: Tensor | None) -> Tensor | None:
    """x as float32 whose last axis is contiguous; copied only if it must be."""
    if x is None:
        return None
    x = x.detach().float()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def rows(x: Tensor | None, axes: str = "bkt") -> Rows:
    """The rows of a float32 tensor; `axes` names its axes but the last, from b, k and t."""
    if x is None:
        return NOTHING
    strides = {axis: 4 * x.stride(i) for i, axis in enumerate(axes)}
    return Rows(x.data_ptr(), strides.get("b", 0), strides.get("k", 0), strides.get("t", 0))


def index_address(index: Tensor | None) -> tuple[Tensor | None, int]:
    """An index as contiguous int32 and its address, 0 for none."""
    if index is None:
        return None, 0
    index = index.to(torch.int32).contiguous()
    return index, index.data_ptr()


@inline
def row(x, b, k, t):
    """Address of a row."""
    return x.base + b * x.image + k * x.direction + t * x.step


@inline
def load(address, lanes):
    """A vector, or the first `lanes` numbers of one and zeros."""
    if lanes >= LANES:
        return load_vector(address)
    x = splat(0.0)
    for i in range(lanes):
        x = with_lane(x, i, load_float(address + 4 * i))
    return x


@inline
def store(address, x, lanes):
    """Writes a vector, or its first `lanes` numbers."""
    if lanes >= LANES:
        store_vector(address, x)
    else:
        for i in range(lanes):
            store_float(address + 4 * i, lane(x, i))


@inline
def add_to(address, x, lanes):
    """Adds a vector, or its first `lanes` numbers, to what stands there."""
    store(address, load(address, lanes) + x, lanes)


@inline
def clear(address, vectors):
    """Writes zeros."""
    for i in range(vectors):
        store_vector(address + i * VECTOR_BYTES, splat(0.0))
