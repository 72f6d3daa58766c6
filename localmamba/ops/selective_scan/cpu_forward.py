"""The selective scan on vectors of channels, forward. The mathematics stands in ops/README.md.

One task is one image, one direction and a block of channels. It takes the scan chunk by chunk, so
that all it works on stays in the first-level cache. What is used together stands together there:
two arrays a multiple of 4096 bytes apart would get in each other's way.
"""

from typing import NamedTuple

from .._common.backends import CHUNK
from .._common.numba_jit import function, inline, kernel
from .._common.rows import (
    Rows,
    Window,
    load,
    put,
    row,
    store,
    take,
    take_columns,
    take_whole,
    whole_vectors,
)
from .._common.simd import (
    LANES,
    LOG2E,
    VECTOR_BYTES,
    all_below,
    atomic_add,
    exp2_of_product,
    exp2_of_small_product,
    load_float,
    load_vector,
    maximum,
    noinline,
    silu,
    softplus,
    splat,
    store_vector,
)

BLOCK = 4
"""Vectors of channels in a task."""

_STEP_BYTES = 2 * VECTOR_BYTES  # u, then y; dt, then z
_STATE_BYTES = 2 * VECTOR_BYTES  # a decay rate and a state


class Inputs(NamedTuple):
    """The rows of the scan's inputs."""

    u: Rows
    dt: Rows
    A: Rows
    B: Rows
    C: Rows
    D: Rows
    z: Rows
    bias: Rows


class Shape(NamedTuple):
    """What the kernels know of a scan besides its inputs.

    Attributes:
        index: Address of the scan orders, int32 [K, P]; 0 without.
        directions: K.
        steps: P.
        channels: D.
        states: N.
        grid_order: Whether u, dt, B and C stand in grid order.
        softplus: Whether step sizes pass through softplus.
    """

    index: int
    directions: int
    steps: int
    channels: int
    states: int
    grid_order: int
    softplus: int


def forward_scratch(states: int) -> int:
    """Floats of scratch memory: u, dt, B and C of a chunk, decay rates and states of a block."""
    return 2 * LANES * (CHUNK + CHUNK * -(-states // LANES) + BLOCK * states)


@inline
def take_decay_rates(A, k, channel, shape, to, to_bytes):
    """A of a vector of channels, times log2(e), as `states` vectors."""
    take_columns(A, k, channel, shape.channels, shape.states, to, to_bytes)
    for n in range(shape.states):
        store_vector(to + n * to_bytes, load_vector(to + n * to_bytes) * LOG2E)


@inline
def small_step_limit(rates, states, rate_bytes):
    """The step size up to which no exponent is large, as a vector."""
    largest = splat(0.0)
    for n in range(states):
        largest = maximum(abs(load_vector(rates + n * rate_bytes)), largest)
    return splat(126.0) / largest


@function
def step_sizes(dt, delta, step_bytes, count, shift, limit, use_softplus):
    """Adds the bias to the dt of a chunk, and writes the step sizes to `delta`.

    Returns:
        Whether all are below the limit.
    """
    noinline()
    small = True
    for step in range(count):
        at = step * step_bytes
        size = load_vector(dt + at) + shift
        store_vector(dt + at, size)
        if use_softplus:
            size = softplus(size)
        store_vector(delta + at, size)
        small = small and all_below(abs(size), limit)
    return small


def _make_advance(power):
    @function
    def advance(count, states, values, B, C, skip, own):
        """Takes the states through a chunk and writes its outputs in the place of u."""
        noinline()
        row_bytes = whole_vectors(states) * VECTOR_BYTES
        for step in range(count):
            at = values + step * _STEP_BYTES
            token, size = load_vector(at), load_vector(at + VECTOR_BYTES)
            b_row, c_row = B + step * row_bytes, C + step * row_bytes
            drive, out = size * token, skip * token
            for n in range(states):
                rate = own + n * _STATE_BYTES
                state = rate + VECTOR_BYTES
                decay = power(size, load_vector(rate))
                h = decay * load_vector(state) + drive * load_float(b_row + 4 * n)
                store_vector(state, h)
                out = out + h * load_float(c_row + 4 * n)
            store_vector(at, out)

    return advance


_advance = _make_advance(exp2_of_product)
_advance_in_small_steps = _make_advance(exp2_of_small_product)


@function
def _gate(values, count):
    noinline()
    for step in range(count):
        at = values + step * _STEP_BYTES
        store_vector(at, load_vector(at) * silu(load_vector(at + VECTOR_BYTES)))


@inline
def load_parameter(x, k, window):
    """A vector of a parameter [K, D], zeros if it is not there."""
    return load(row(x, 0, k, 0) + window.at, window.lanes) if x.base else splat(0.0)


@inline
def _scan_vector(b, k, window, shape, inputs, tokens, y, values, B, C, own):
    """A chunk of one vector of channels."""
    delta, count = values + VECTOR_BYTES, window.count
    sources = tokens if shape.grid_order else 0
    take(inputs.u, b, k, sources, window, values, _STEP_BYTES)
    take(inputs.dt, b, k, sources, window, delta, _STEP_BYTES)
    shift = load_parameter(inputs.bias, k, window)
    skip = load_parameter(inputs.D, k, window)
    limit = small_step_limit(own, shape.states, _STATE_BYTES)
    if step_sizes(delta, delta, _STEP_BYTES, count, shift, limit, shape.softplus):
        _advance_in_small_steps(count, shape.states, values, B, C, skip, own)
    else:
        _advance(count, shape.states, values, B, C, skip, own)
    if inputs.z.base:
        take(inputs.z, b, k, tokens, window, delta, _STEP_BYTES)
        _gate(values, count)
    put(y, b, k, tokens, window, values, _STEP_BYTES, 0)


@inline
def _scan_block(b, k, channels, shape, inputs, y, kept, scratch):
    """One direction of one image, for a block of channels."""
    states = shape.states
    tokens = tokens_of(shape, k)
    sources = tokens if shape.grid_order else 0
    b_part = scratch + CHUNK * _STEP_BYTES
    c_part = b_part + CHUNK * whole_vectors(states) * VECTOR_BYTES
    block = c_part + CHUNK * whole_vectors(states) * VECTOR_BYTES
    for i, channel in enumerate(channels):
        own = block + i * states * _STATE_BYTES
        take_decay_rates(inputs.A, k, channel, shape, own, _STATE_BYTES)
        for n in range(states):
            store_vector(own + n * _STATE_BYTES + VECTOR_BYTES, splat(0.0))
    for first in range(0, shape.steps, CHUNK):
        count = min(CHUNK, shape.steps - first)
        take_whole(inputs.B, b, k, sources, first, count, states, b_part)
        take_whole(inputs.C, b, k, sources, first, count, states, c_part)
        for i, channel in enumerate(channels):
            own = block + i * states * _STATE_BYTES
            window = window_of(first, channel, shape)
            if kept.base:
                to = row(kept, b, k, first // CHUNK * states) + window.at
                for n in range(states):
                    h = load_vector(own + n * _STATE_BYTES + VECTOR_BYTES)
                    store(to + n * kept.step, h, window.lanes)
            _scan_vector(b, k, window, shape, inputs, tokens, y, scratch, b_part, c_part, own)


@inline
def tokens_of(shape, k):
    """Address of the tokens that a direction reads; 0 without an index."""
    return shape.index + 4 * k * shape.steps if shape.index else 0


@inline
def window_of(first, channel, shape):
    """The chunk from step `first` on, of the vector from `channel` on."""
    count, lanes = min(CHUNK, shape.steps - first), min(LANES, shape.channels - channel)
    return Window(first, count, 4 * channel, lanes)


@inline
def blocks_of(channels):
    """Blocks that hold this many channels."""
    return (channels + BLOCK * LANES - 1) // (BLOCK * LANES)


@inline
def channels_of(block, channels):
    """The first channels of the vectors of a block."""
    start = block * BLOCK * LANES
    return range(start, min(channels, start + BLOCK * LANES), LANES)


@kernel
def scan_forward_kernel(counter, tasks, scratch, shape, inputs, y, kept):
    """Writes the outputs, and the states at the start of each chunk if `kept` is there."""
    blocks = blocks_of(shape.channels)
    task = atomic_add(counter)
    while task < tasks:
        b, k = task // blocks // shape.directions, task // blocks % shape.directions
        _scan_block(
            b, k, channels_of(task % blocks, shape.channels), shape, inputs, y, kept, scratch
        )
        task = atomic_add(counter)
