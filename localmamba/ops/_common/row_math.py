"""What pooling and merging do to the channels of one token, as rows of whole vectors.

Rows in scratch memory are filled with zeros to whole vectors, and stay so. Here `vectors` counts
the vectors of a row.
"""

import math

import numba

from .jit import function, inline
from .rows import load, store
from .vector_math import sigmoid
from .vectors import (
    LANES,
    VECTOR_BYTES,
    load_vector,
    quarter_turn,
    splat,
    stay_a_function,
    store_vector,
    total,
    with_lane,
)

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
    stay_a_function()
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
def normalise(x, channels, eps, centred):
    """Divides a row by the root of its mean square, in place; `centred`, without its mean first.

    The mean is taken off twice: the second time, what rounding left of a large one.

    Returns:
        What it was multiplied by.
    """
    stay_a_function()
    vectors, share = (channels + LANES - 1) // LANES, ONE / numba.float32(channels)
    sums, rest, squares = splat(0.0), splat(0.0), splat(0.0)
    for i in range(vectors):
        sums = sums + load_vector(x + i * VECTOR_BYTES)
    mean = splat(total(sums) * share) if centred else splat(0.0)
    for i in range(vectors):
        moved = load_vector(x + i * VECTOR_BYTES) - mean
        if channels < (i + 1) * LANES:
            moved = _first_lanes(moved, channels - i * LANES)
        store_vector(x + i * VECTOR_BYTES, moved)
        rest, squares = rest + moved, squares + moved * moved
    left = total(rest) * share if centred else _ZERO
    variance = total(squares) * share - left * left
    scale = ONE / math.sqrt(max(variance, _ZERO) + numba.float32(eps))
    for i in range(vectors):
        scaled = (load_vector(x + i * VECTOR_BYTES) - left) * scale
        if channels < (i + 1) * LANES:
            scaled = _first_lanes(scaled, channels - i * LANES)
        store_vector(x + i * VECTOR_BYTES, scaled)
    return scale


@function
def normalise_backward(gradient, x, channels, scale, centred):
    """The gradient through `normalise`, in place, from its results."""
    stay_a_function()
    vectors, share = (channels + LANES - 1) // LANES, ONE / numba.float32(channels)
    sums, products = splat(0.0), splat(0.0)
    for i in range(vectors):
        g = load_vector(gradient + i * VECTOR_BYTES)
        sums, products = sums + g, products + g * load_vector(x + i * VECTOR_BYTES)
    mean, along = total(sums) * share if centred else _ZERO, total(products) * share
    for i in range(vectors):
        at = i * VECTOR_BYTES
        g = (load_vector(gradient + at) - mean - load_vector(x + at) * along) * scale
        if channels < (i + 1) * LANES:
            g = _first_lanes(g, channels - i * LANES)
        store_vector(gradient + at, g)


@function
def turn(x, cos, sin, sign, vectors):
    """Turns neighbouring pairs of channels by the angles of the tables; back, if `sign` is -1."""
    for i in range(vectors):
        at = i * VECTOR_BYTES
        value = load_vector(x + at)
        turned = value * load_vector(cos + at)
        turned = turned + quarter_turn(value) * load_vector(sin + at) * sign
        store_vector(x + at, turned)


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
