"""The selective scan on vectors of channels, forward. The mathematics stands in ops/README.md.

One task is one image, one direction and a block of channels. It takes the scan chunk by chunk, so
that all it works on stays in the first-level cache.
"""

from ..backends import CHUNK
from .jit import function, inline, kernel
from .math import (
    LOG2E,
    exp2_of_product,
    exp2_of_small_product,
    magnitude,
    silu,
    softplus,
)
from .rows import clear, gather, gather_wide, load, row, scatter, store, whole_vectors
from .vectors import (
    LANES,
    VECTOR_BYTES,
    all_below,
    at_least,
    draw,
    load_float,
    load_vector,
    splat,
    stay_a_function,
    store_float,
    store_vector,
)

BLOCK = 4
"""Vectors of channels in a task."""

CHUNK_BYTES = CHUNK * VECTOR_BYTES

PAIR_BYTES = 2 * VECTOR_BYTES
STEP_BYTES = 4 * VECTOR_BYTES


def forward_scratch(states: int) -> int:
    """Floats of scratch memory: u, dt, z, y, B and C of a chunk, rates and states of a block."""
    return LANES * (4 * CHUNK + 2 * CHUNK * -(-states // LANES) + 2 * BLOCK * states)


@function
def load_decay_rates(a_rows, a_step, lanes, states, to):
    """Writes A of a vector of channels, times log2(e), as states x lanes; zeros beside the lanes.

    The states stand between them, for neighbours do not compete for one place in the cache.
    """
    clear(to, 2 * states)
    for i in range(lanes):
        for n in range(states):
            rate = load_float(a_rows + i * a_step + 4 * n) * LOG2E
            store_float(to + n * PAIR_BYTES + 4 * i, rate)


@inline
def small_step_limit(rates, states):
    """The step size up to which no exponent is large, as a vector."""
    largest = splat(0.0)
    for n in range(states):
        largest = at_least(magnitude(load_vector(rates + n * PAIR_BYTES)), largest)
    return splat(126.0) / largest


@function
def step_sizes(dt, count, shift, limit, use_softplus):
    """Adds the bias to the dt of a chunk and takes the softplus, in place.

    Returns:
        Whether all are below the limit.
    """
    stay_a_function()
    small = True
    for step in range(count):
        at = dt + step * STEP_BYTES
        delta = load_vector(at) + shift
        if use_softplus:
            delta = softplus(delta)
        store_vector(at, delta)
        small = small and all_below(magnitude(delta), limit)
    return small


def _make_advance(power):
    @function
    def advance(count, states, u, delta, B, C, skip, rates, y):
        """Takes the states through a chunk and writes its outputs."""
        stay_a_function()
        row_bytes = whole_vectors(states) * VECTOR_BYTES
        for step in range(count):
            at = step * STEP_BYTES
            token, size = load_vector(u + at), load_vector(delta + at)
            b_row, c_row = B + step * row_bytes, C + step * row_bytes
            drive, out = size * token, skip * token
            for n in range(states):
                pair = rates + n * PAIR_BYTES
                decay = power(size, load_vector(pair))
                h = decay * load_vector(pair + VECTOR_BYTES) + drive * load_float(b_row + 4 * n)
                store_vector(pair + VECTOR_BYTES, h)
                out = out + h * load_float(c_row + 4 * n)
            store_vector(y + at, out)

    return advance


_advance = _make_advance(exp2_of_product)
_advance_in_small_steps = _make_advance(exp2_of_small_product)


@function
def _gate(y, z, count):
    stay_a_function()
    for step in range(count):
        at = step * STEP_BYTES
        store_vector(y + at, load_vector(y + at) * silu(load_vector(z + at)))


@inline
def load_parameter(x, k, at, lanes):
    """A vector of a parameter [K, D], zeros if it is not there."""
    return load(row(x, 0, k, 0) + at, lanes) if x.base else splat(0.0)


@inline
def _scan_vector(
    b, k, channel, lanes, first, count, sizes, u, dt, D, z, bias, tokens, y, scratch, B, C, rates
):
    """A chunk of one vector of channels."""
    states, grid_order, use_softplus = sizes
    at = 4 * channel
    u_part, delta = scratch, scratch + VECTOR_BYTES
    z_part, y_part = scratch + 2 * VECTOR_BYTES, scratch + 3 * VECTOR_BYTES
    sources = tokens if grid_order else 0
    gather(row(u, b, k, 0) + at, u.step, sources, first, count, lanes, u_part, STEP_BYTES)
    gather(row(dt, b, k, 0) + at, dt.step, sources, first, count, lanes, delta, STEP_BYTES)
    shift, skip = load_parameter(bias, k, at, lanes), load_parameter(D, k, at, lanes)
    limit = small_step_limit(rates, states)
    if step_sizes(delta, count, shift, limit, use_softplus):
        _advance_in_small_steps(count, states, u_part, delta, B, C, skip, rates, y_part)
    else:
        _advance(count, states, u_part, delta, B, C, skip, rates, y_part)
    if z.base:
        gather(row(z, b, k, 0) + at, z.step, tokens, first, count, lanes, z_part, STEP_BYTES)
        _gate(y_part, z_part, count)
    scatter(y_part, STEP_BYTES, row(y, b, k, 0) + at, y.step, tokens, first, count, lanes, False)


@inline
def _scan_block(
    b, k, start, channels, steps, sizes, u, dt, A, B, C, D, z, bias, index, y, kept, scratch
):
    """One direction of one image for the channels of a block."""
    states = sizes[0]
    tokens = index + 4 * k * steps if index else 0
    sources = tokens if sizes[1] else 0
    b_part = scratch + 4 * CHUNK_BYTES
    c_part = b_part + whole_vectors(states) * CHUNK_BYTES
    rates = c_part + whole_vectors(states) * CHUNK_BYTES
    stop = min(channels, start + BLOCK * LANES)
    for channel in range(start, stop, LANES):
        own = (channel - start) // LANES * states * PAIR_BYTES
        lanes = min(LANES, channels - channel)
        load_decay_rates(row(A, 0, k, channel), A.step, lanes, states, rates + own)
    for first in range(0, steps, CHUNK):
        count = min(CHUNK, steps - first)
        gather_wide(row(B, b, k, 0), B.step, sources, first, count, states, b_part)
        gather_wide(row(C, b, k, 0), C.step, sources, first, count, states, c_part)
        for channel in range(start, stop, LANES):
            own = (channel - start) // LANES * states * PAIR_BYTES
            lanes = min(LANES, channels - channel)
            if kept.base:
                to = row(kept, b, k, first // CHUNK * states) + 4 * channel
                for n in range(states):
                    h = load_vector(rates + own + n * PAIR_BYTES + VECTOR_BYTES)
                    store(to + n * kept.step, h, lanes)
            _scan_vector(
                b, k, channel, lanes, first, count, sizes, u, dt, D, z, bias, tokens, y, scratch,
                b_part, c_part, rates + own,
            )  # fmt: skip


@kernel
def scan_forward_kernel(
    counter, tasks, scratch, directions, channels, steps, sizes,
    u, dt, A, B, C, D, z, bias, index, y, kept,
):  # fmt: skip
    """`sizes`: number of states, whether inputs stand in grid order, whether to use softplus."""
    blocks = (channels + BLOCK * LANES - 1) // (BLOCK * LANES)
    task = draw(counter)
    while task < tasks:
        block, k, b = task % blocks, task // blocks % directions, task // blocks // directions
        _scan_block(
            b, k, block * BLOCK * LANES, channels, steps, sizes,
            u, dt, A, B, C, D, z, bias, index, y, kept, scratch,
        )  # fmt: skip
        task = draw(counter)
