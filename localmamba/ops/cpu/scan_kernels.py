"""The selective scan on vectors of channels, forward. The mathematics stands in ops/README.md.

One task is one image, one direction and a block of channels; it walks the scan once for each vector of
channels, whose states stay in the first-level cache.
"""

from ..backends import CHUNK
from .jit import inline, kernel
from .math import LOG2E, exp2, silu, softplus
from .rows import clear, load, row, store
from .vectors import (
    LANES,
    VECTOR_BYTES,
    draw,
    load_float,
    load_int,
    load_vector,
    splat,
    store_float,
    store_vector,
)

BLOCK = 4 * LANES
"""Channels of a task."""


@inline
def load_decay_rates(a, k, channel, lanes, states, to):
    """Writes A of a vector of channels, times log2(e), as states x lanes; zeros beside the lanes."""
    clear(to, states)
    for i in range(lanes):
        source = row(a, 0, k, channel + i)
        for n in range(states):
            rate = load_float(source + 4 * n) * LOG2E
            store_float(to + n * VECTOR_BYTES + 4 * i, rate)


@inline
def token_at(index, k, steps, step):
    """The token read at a step; negative for padding."""
    if index == 0:
        return step
    return load_int(index + 4 * (k * steps + step))


@inline
def _scan_lanes(b, k, channel, lanes, sizes, u, dt, B, C, D, z, bias, index, y, kept, scratch):
    steps, states, grid_order, use_softplus = sizes
    state_bytes = states * VECTOR_BYTES
    rates, state, nothing = scratch, scratch + state_bytes, scratch + 2 * state_bytes
    at = 4 * channel
    skip, shift = splat(0.0), splat(0.0)
    if D.base:
        skip = load(row(D, 0, k, 0) + at, lanes)
    if bias.base:
        shift = load(row(bias, 0, k, 0) + at, lanes)
    for step in range(steps):
        if kept.base and step % CHUNK == 0:
            to = row(kept, b, k, step // CHUNK * states) + at
            for n in range(states):
                store(to + n * kept.step, load_vector(state + n * VECTOR_BYTES), lanes)
        token = token_at(index, k, steps, step)
        source = token if grid_order else step
        token_u, delta, b_row, c_row = splat(0.0), shift, nothing, nothing
        if source >= 0:
            token_u = load(row(u, b, k, source) + at, lanes)
            delta = load(row(dt, b, k, source) + at, lanes) + shift
            b_row, c_row = row(B, b, k, source), row(C, b, k, source)
        if use_softplus:
            delta = softplus(delta)
        drive = delta * token_u
        out = skip * token_u
        for n in range(states):
            place = n * VECTOR_BYTES
            decay = exp2(delta * load_vector(rates + place))
            h = decay * load_vector(state + place) + drive * load_float(b_row + 4 * n)
            store_vector(state + place, h)
            out = out + h * load_float(c_row + 4 * n)
        if token >= 0:
            if z.base:
                out = out * silu(load(row(z, b, k, token) + at, lanes))
            store(row(y, b, k, token) + at, out, lanes)


@kernel
def scan_forward_kernel(
    counter, tasks, scratch, sizes, directions, channels, u, dt, A, B, C, D, z, bias, index, y, kept
):
    """Scratch: states x lanes of rates, the same of states, and a row of zeros for padding."""
    states = sizes[1]
    blocks = (channels + BLOCK - 1) // BLOCK
    task = draw(counter)
    while task < tasks:
        block, k, b = task % blocks, task // blocks % directions, task // blocks // directions
        for channel in range(block * BLOCK, min(channels, (block + 1) * BLOCK), LANES):
            lanes = min(LANES, channels - channel)
            load_decay_rates(A, k, channel, lanes, states, scratch)
            clear(scratch + states * VECTOR_BYTES, 2 * states)
            _scan_lanes(
                b, k, channel, lanes, sizes, u, dt, B, C, D, z, bias, index, y, kept, scratch
            )
        task = draw(counter)
