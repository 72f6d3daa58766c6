"""What pooling and merging do to the channels of one token, as rows of whole vectors.

Rows in scratch memory are filled with zeros to whole vectors, and stay so.
"""

from .jit import function, inline
from .math import sigmoid
from .rows import load, store
from .vectors import (
    LANES,
    VECTOR_BYTES,
    load_vector,
    splat,
    stay_a_function,
    store_float,
    store_vector,
    total,
)


def whole(channels: int) -> int:
    """Floats of a row in scratch memory."""
    return -(-channels // LANES) * LANES


@inline
def whole_bytes(channels):
    """Bytes of a row in scratch memory."""
    return (channels + LANES - 1) // LANES * VECTOR_BYTES


@function
def take_row(source, channels, to):
    """Copies a row to scratch memory."""
    for channel in range(0, channels, LANES):
        x = load(source + 4 * channel, min(LANES, channels - channel))
        store_vector(to + 4 * channel, x)


@function
def put_row(source, channels, to):
    """Copies a row from scratch memory."""
    for channel in range(0, channels, LANES):
        store(to + 4 * channel, load_vector(source + 4 * channel), min(LANES, channels - channel))


@function
def fill_row(value, channels, to):
    """Writes one value to the channels of a row."""
    for at in range(0, whole_bytes(channels), VECTOR_BYTES):
        store_vector(to + at, splat(value))
    _clear_tail(to, channels)


@inline
def _clear_tail(to, channels):
    for channel in range(channels, whole_bytes(channels) // 4):
        store_float(to + 4 * channel, 0.0)


@function
def gate(z, channels, gates, slopes):
    """SiLU of a row and its derivative."""
    stay_a_function()
    for at in range(0, whole_bytes(channels), VECTOR_BYTES):
        x = load_vector(z + at)
        s = sigmoid(x)
        store_vector(gates + at, x * s)
        store_vector(slopes + at, s * (x * (splat(1.0) - s) + 1.0))


@function
def normalise(x, channels, eps):
    """Takes the mean from a row and divides by the standard deviation, in place.

    Returns:
        What it was multiplied by.
    """
    stay_a_function()
    end, sums = whole_bytes(channels), splat(0.0)
    for at in range(0, end, VECTOR_BYTES):
        sums = sums + load_vector(x + at)
    mean, squares = total(sums) / channels, splat(0.0)
    for at in range(0, end, VECTOR_BYTES):
        store_vector(x + at, load_vector(x + at) - mean)
    _clear_tail(x, channels)
    for at in range(0, end, VECTOR_BYTES):
        squares = squares + load_vector(x + at) * load_vector(x + at)
    scale = 1.0 / (total(squares) / channels + eps) ** 0.5
    for at in range(0, end, VECTOR_BYTES):
        store_vector(x + at, load_vector(x + at) * scale)
    return scale


@function
def normalise_backward(gradient, x, channels, scale):
    """The gradient through `normalise`, in place, from its results."""
    stay_a_function()
    end, sums, products = whole_bytes(channels), splat(0.0), splat(0.0)
    for at in range(0, end, VECTOR_BYTES):
        g = load_vector(gradient + at)
        sums = sums + g
        products = products + g * load_vector(x + at)
    mean, along = total(sums) / channels, total(products) / channels
    for at in range(0, end, VECTOR_BYTES):
        g = load_vector(gradient + at) - mean - load_vector(x + at) * along
        store_vector(gradient + at, g * scale)
    _clear_tail(gradient, channels)


@function
def multiply(x, y, factor, channels, to):
    """The product of two rows and a number."""
    for at in range(0, whole_bytes(channels), VECTOR_BYTES):
        store_vector(to + at, load_vector(x + at) * load_vector(y + at) * factor)


@function
def add_product(x, y, factor, channels, to):
    """Adds the product of two rows and a number to a row."""
    for at in range(0, whole_bytes(channels), VECTOR_BYTES):
        product = load_vector(x + at) * load_vector(y + at) * factor
        store_vector(to + at, load_vector(to + at) + product)


@function
def add(x, channels, to):
    """Adds a row to another."""
    for at in range(0, whole_bytes(channels), VECTOR_BYTES):
        store_vector(to + at, load_vector(to + at) + load_vector(x + at))


@function
def dot(x, y, w, channels):
    """The sum over channels of the product of three rows."""
    sums = splat(0.0)
    for at in range(0, whole_bytes(channels), VECTOR_BYTES):
        sums = sums + load_vector(x + at) * load_vector(y + at) * load_vector(w + at)
    return total(sums)
