"""Rows of tensors, as kernels see them: addresses and strides in bytes, each row contiguous floats.

Kernels copy the part of a row that they work on, a vector wide, to and from scratch memory. Reading
along a scan order, padding and channels that do not fill a vector are dealt with here alone.
"""

import math
from typing import NamedTuple

import numba
import torch
from torch import Tensor

from .numba_jit import function, inline
from .simd import (
    LANES,
    VECTOR_BYTES,
    lane,
    load_float,
    load_int,
    load_vector,
    noinline,
    rotate_every_two,
    sigmoid,
    splat,
    store_float,
    store_vector,
    total,
    with_lane,
)


class Rows(NamedTuple):
    """The rows [b, k, t] of a tensor [B, K, T, *]: where the first is, and the way to the next.

    Attributes:
        base: Address of the first row; 0 for a tensor that is not there.
        image: From b to b + 1; 0 if the images share their rows.
        direction: From k to k + 1; 0 if the directions share their rows.
        step: From t to t + 1.
        count: T. Tokens of an index from there on read as padding, so that no index, however
            wrong, makes a kernel leave the tensor.
    """

    base: int
    image: int
    direction: int
    step: int
    count: int  # type: ignore[assignment] # shadows tuple.count


NOTHING = Rows(0, 0, 0, 0, 0)


def floats(x: Tensor | None) -> Tensor | None:
    """x as float32 whose last axis is contiguous; copied only if it must be."""
    if x is None:
        return None
    if x.dtype is not torch.float32:
        x = x.float()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def rows(x: Tensor | None, axes: str = "bkt") -> Rows:
    """The rows of a float32 tensor; `axes` names its axes but the last, from b, k and t."""
    if x is None:
        return NOTHING
    strides, b, k, t = x.stride(), axes.find("b"), axes.find("k"), axes.find("t")
    return Rows(
        x.data_ptr(),
        4 * strides[b] if b >= 0 else 0,
        4 * strides[k] if k >= 0 else 0,
        4 * strides[t] if t >= 0 else 0,
        x.shape[t] if t >= 0 else 1,
    )


def int32_index(index: Tensor | None) -> tuple[Tensor | None, int]:
    """An index as contiguous int32, and its address; 0 for none."""
    if index is None:
        return None, 0
    index = index.to(torch.int32).contiguous()
    return index, index.data_ptr()


@inline
def row(x, b, k, t):
    """Address of a row."""
    return x.base + b * x.image + k * x.direction + t * x.step


@inline
def token_at(tokens, step):
    """The token that a step reads, negative for none. `tokens` 0 reads them as they stand."""
    return load_int(tokens + 4 * step) if tokens and step >= 0 else step


@inline
def load(address, lanes):
    """The first `lanes` numbers of a vector, zeros in the others."""
    if lanes == LANES:
        return load_vector(address)
    x = splat(0.0)
    for i in range(lanes):
        x = with_lane(x, i, load_float(address + 4 * i))
    return x


@inline
def store(address, x, lanes):
    """Writes the first `lanes` numbers of a vector."""
    if lanes == LANES:
        store_vector(address, x)
    else:
        for i in range(lanes):
            store_float(address + 4 * i, lane(x, i))


class Window(NamedTuple):
    """A chunk of steps, and a vector of channels.

    Attributes:
        first: The first step; steps before 0 read as padding.
        count: Steps.
        at: Bytes from the start of a row to the first channel.
        lanes: Channels, at most `LANES`.
    """

    first: int
    count: int  # type: ignore[assignment] # shadows tuple.count
    at: int
    lanes: int


@function
def _gather(source, step_bytes, rows_there, tokens, window, to, to_bytes):
    noinline()
    for step in range(window.count):
        token = token_at(tokens, window.first + step)
        x = splat(0.0)
        if 0 <= token < rows_there:
            x = load(source + token * step_bytes, window.lanes)
        store_vector(to + step * to_bytes, x)


@function
def _scatter(source, source_bytes, to, step_bytes, rows_there, tokens, window, add):
    noinline()
    for step in range(window.count):
        token = token_at(tokens, window.first + step)
        if 0 <= token < rows_there:
            address = to + token * step_bytes
            x = load_vector(source + step * source_bytes)
            if add:
                x = x + load(address, window.lanes)
            store(address, x, window.lanes)


@inline
def take(x, b, k, tokens, window, to, to_bytes):
    """Copies part of the rows of (b, k) to scratch memory, zeros for padding."""
    _gather(row(x, b, k, 0) + window.at, x.step, x.count, tokens, window, to, to_bytes)


@inline
def put(x, b, k, tokens, window, source, source_bytes, add):
    """The inverse of `take`, padding dropped; with `add`, added to what stands there."""
    to = row(x, b, k, 0) + window.at
    _scatter(source, source_bytes, to, x.step, x.count, tokens, window, add)


@function
def take_columns(x, k, channel, channels, width, to, to_bytes):
    """Copies the columns of a vector of rows of (0, k), [channels, width], to scratch memory."""
    lanes = min(LANES, channels - channel)
    for n in range(width):
        column = splat(0.0)
        for i in range(lanes):
            column = with_lane(column, i, load_float(row(x, 0, k, channel + i) + 4 * n))
        store_vector(to + n * to_bytes, column)


@inline
def take_whole(x, b, k, tokens, first, count, width, to):
    """`take` of whole rows, each filled with zeros to whole vectors."""
    wide = whole_vectors(width)
    for i in range(wide):
        at = i * VECTOR_BYTES
        window = Window(first, count, at, min(LANES, width - i * LANES))
        take(x, b, k, tokens, window, to + at, wide * VECTOR_BYTES)


@inline
def put_whole(x, b, k, tokens, first, count, width, source):
    """The inverse of `take_whole`."""
    wide = whole_vectors(width)
    for i in range(wide):
        at = i * VECTOR_BYTES
        window = Window(first, count, at, min(LANES, width - i * LANES))
        put(x, b, k, tokens, window, source + at, wide * VECTOR_BYTES, 0)


@inline
def whole_vectors(width):
    """Vectors that hold `width` numbers."""
    return (width + LANES - 1) // LANES


@inline
def clear(address, vectors):
    """Writes zeros."""
    for i in range(vectors):
        store_vector(address + i * VECTOR_BYTES, splat(0.0))


_ZERO, ONE = numba.float32(0), numba.float32(1)  # a plain 1.0 would be float64


@function
def take_row(source, channels, to):
    """Copies a row to scratch memory."""
    for i in range(channels // LANES):
        store_vector(to + i * VECTOR_BYTES, load_vector(source + i * VECTOR_BYTES))
    if channels % LANES:
        at = channels // LANES * VECTOR_BYTES
        store_vector(to + at, load(source + at, channels % LANES))


@function
def put_row(source, channels, to):
    """Copies a row from scratch memory."""
    for i in range(channels // LANES):
        store_vector(to + i * VECTOR_BYTES, load_vector(source + i * VECTOR_BYTES))
    if channels % LANES:
        at = channels // LANES * VECTOR_BYTES
        store(to + at, load_vector(source + at), channels % LANES)


@function
def fill_row(value, vectors, to):
    """Writes one value everywhere."""
    for i in range(vectors):
        store_vector(to + i * VECTOR_BYTES, splat(value))


@function
def gate(z, vectors, gates, slopes):
    """SiLU of a row and its derivative."""
    noinline()
    for i in range(vectors):
        x = load_vector(z + i * VECTOR_BYTES)
        s = sigmoid(x)
        store_vector(gates + i * VECTOR_BYTES, x * s)
        store_vector(slopes + i * VECTOR_BYTES, s * (x * (splat(1.0) - s) + 1.0))


@inline
def _first_lanes(x, lanes):
    for i in range(lanes, LANES):
        x = with_lane(x, i, _ZERO)
    return x


@function
def normalize(x, channels, eps, centered):
    """Divides a row by the root of its mean square, in place; `centered`, without its mean first.

    The mean is taken off twice: the second time, what rounding left of a large one.

    Returns:
        What it was multiplied by.
    """
    noinline()
    vectors, share = (channels + LANES - 1) // LANES, ONE / numba.float32(channels)
    sums, rest, squares = splat(0.0), splat(0.0), splat(0.0)
    for i in range(vectors):
        sums = sums + load_vector(x + i * VECTOR_BYTES)
    mean = splat(total(sums) * share) if centered else splat(0.0)
    for i in range(vectors):
        moved = load_vector(x + i * VECTOR_BYTES) - mean
        if channels < (i + 1) * LANES:
            moved = _first_lanes(moved, channels - i * LANES)
        store_vector(x + i * VECTOR_BYTES, moved)
        rest, squares = rest + moved, squares + moved * moved
    left = total(rest) * share if centered else _ZERO
    variance = total(squares) * share - left * left
    scale = ONE / math.sqrt(max(variance, _ZERO) + numba.float32(eps))
    for i in range(vectors):
        scaled = (load_vector(x + i * VECTOR_BYTES) - left) * scale
        if channels < (i + 1) * LANES:
            scaled = _first_lanes(scaled, channels - i * LANES)
        store_vector(x + i * VECTOR_BYTES, scaled)
    return scale


@function
def normalize_backward(gradient, x, channels, scale, centered):
    """The gradient through `normalize`, in place, from its results."""
    noinline()
    vectors, share = (channels + LANES - 1) // LANES, ONE / numba.float32(channels)
    sums, products = splat(0.0), splat(0.0)
    for i in range(vectors):
        g = load_vector(gradient + i * VECTOR_BYTES)
        sums, products = sums + g, products + g * load_vector(x + i * VECTOR_BYTES)
    mean, along = total(sums) * share if centered else _ZERO, total(products) * share
    for i in range(vectors):
        at = i * VECTOR_BYTES
        g = (load_vector(gradient + at) - mean - load_vector(x + at) * along) * scale
        if channels < (i + 1) * LANES:
            g = _first_lanes(g, channels - i * LANES)
        store_vector(gradient + at, g)


@function
def rotate(x, cos, sin, sign, vectors):
    """Rotates pairs of channels by the angles of the tables; back, if `sign` is -1."""
    for i in range(vectors):
        at = i * VECTOR_BYTES
        value = load_vector(x + at)
        rotated = value * load_vector(cos + at)
        rotated = rotated + rotate_every_two(value) * load_vector(sin + at) * sign
        store_vector(x + at, rotated)


@function
def multiply(x, y, factor, vectors, to):
    """The product of two rows and a number."""
    for i in range(vectors):
        at = i * VECTOR_BYTES
        store_vector(to + at, load_vector(x + at) * load_vector(y + at) * factor)


@function
def scale_row(factor, vectors, x):
    """Multiplies a row by a number, in place."""
    for i in range(vectors):
        at = i * VECTOR_BYTES
        store_vector(x + at, load_vector(x + at) * factor)


@function
def add_product(x, y, factor, vectors, to):
    """Adds the product of two rows and a number to a row."""
    for i in range(vectors):
        at = i * VECTOR_BYTES
        product = load_vector(x + at) * load_vector(y + at) * factor
        store_vector(to + at, load_vector(to + at) + product)


@function
def add(x, vectors, to):
    """Adds a row to another."""
    for i in range(vectors):
        at = i * VECTOR_BYTES
        store_vector(to + at, load_vector(to + at) + load_vector(x + at))


@function
def dot(x, y, w, vectors):
    """The sum over channels of the product of three rows."""
    sums = splat(0.0)
    for i in range(vectors):
        at = i * VECTOR_BYTES
        sums = sums + load_vector(x + at) * load_vector(y + at) * load_vector(w + at)
    return total(sums)
