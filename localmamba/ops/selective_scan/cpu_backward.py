"""The selective scan on vectors of channels, backward. The mathematics stands in ops/README.md.

One task is one image, one block of channels and one direction; or all directions one after another,
where they add to one gradient (of a u or a z that they share). It takes the chunks from the last
to the first. Each is replayed from its kept states, its decays and states written down, and then
walked backwards.
"""

from typing import NamedTuple

from .._common.backends import CHUNK
from .._common.numba_jit import function, inline, kernel
from .._common.rows import (
    Rows,
    clear,
    load,
    put,
    put_whole,
    row,
    store,
    take,
    take_whole,
    whole_vectors,
)
from .._common.simd import (
    LANES,
    LN2,
    VECTOR_BYTES,
    atomic_add,
    exp2_of_product,
    exp2_of_small_product,
    load_float,
    load_vector,
    noinline,
    row_totals,
    sigmoid,
    splat,
    store_vector,
)
from .cpu_forward import (
    BLOCK,
    blocks_of,
    channels_of,
    load_parameter,
    small_step_limit,
    step_sizes,
    take_decay_rates,
    tokens_of,
    window_of,
)

# Of a step: u, dt, delta, dy, z and y; their gradients replace u, dt and z.
_DT, _DELTA, _DY, _Z, _Y = (i * VECTOR_BYTES for i in range(1, 6))
_STEP_BYTES = 6 * VECTOR_BYTES

# Of a state during the walk back: its decay rate, the gradient that reaches it, that of A.
_GRADIENT, _DA = VECTOR_BYTES, 2 * VECTOR_BYTES
_STATE_BYTES = 3 * VECTOR_BYTES

# Of a state at a step: its decay, and its value before.
_BEFORE = VECTOR_BYTES
_RECORD_BYTES = 2 * VECTOR_BYTES


class Gradients(NamedTuple):
    """The rows of the gradients; those of parameters are one part an image, to be added.

    B and C get one part a block of channels; their rows count blocks times images.
    """

    u: Rows
    dt: Rows
    A: Rows
    B: Rows
    C: Rows
    D: Rows
    z: Rows
    bias: Rows


def backward_scratch(states: int) -> int:
    """Floats of scratch memory: values, B, C, dB, dC and records of a chunk, a block's states."""
    wide = -(-states // LANES)
    records = 2 * (CHUNK + 1) * states
    return LANES * (6 * CHUNK + 4 * wide * CHUNK + 3 * BLOCK * states + wide * LANES + records)


@inline
def _parts_of(scratch, states):
    """Where B, C, dB and dC of a chunk stand in scratch memory."""
    size = CHUNK * whole_vectors(states) * VECTOR_BYTES
    B = scratch + CHUNK * _STEP_BYTES
    return B, B + size, B + 2 * size, B + 3 * size


@inline
def _add_row_totals(products, states, to):
    """Adds the total over lanes of each state's product to the row of a step."""
    for i in range(whole_vectors(states)):
        at = to + i * VECTOR_BYTES
        store_vector(at, load_vector(at) + row_totals(products + i * LANES * VECTOR_BYTES))


def _make_replay(power):
    @function
    def replay(count, states, values, B, C, dC, skip, own, products, records):
        """Goes through a chunk again: writes decays, states and outputs, adds to dC.

        Returns:
            The gradient of the skip weights.
        """
        noinline()
        row_bytes, skipped = whole_vectors(states) * VECTOR_BYTES, splat(0.0)
        for step in range(count):
            at = values + step * _STEP_BYTES
            token, size, dy = load_vector(at), load_vector(at + _DELTA), load_vector(at + _DY)
            b_row, c_row = B + step * row_bytes, C + step * row_bytes
            drive, out = size * token, skip * token
            for n in range(states):
                record = records + (step * states + n) * _RECORD_BYTES
                decay = power(size, load_vector(own + n * _STATE_BYTES))
                h = decay * load_vector(record + _BEFORE) + drive * load_float(b_row + 4 * n)
                store_vector(record, decay)
                store_vector(record + states * _RECORD_BYTES + _BEFORE, h)
                store_vector(products + n * VECTOR_BYTES, h * dy)
                out = out + h * load_float(c_row + 4 * n)
            store_vector(at + _Y, out)
            skipped = skipped + token * dy
            _add_row_totals(products, states, dC + step * row_bytes)
        return skipped

    return replay


_replay = _make_replay(exp2_of_product)
_replay_in_small_steps = _make_replay(exp2_of_small_product)


@function
def _walk_back(count, states, values, B, C, dB, skip, own, products, records):
    """From the last step of a chunk to the first: du and ddelta in the places of u and delta."""
    noinline()
    row_bytes = whole_vectors(states) * VECTOR_BYTES
    for step in range(count - 1, -1, -1):
        at = values + step * _STEP_BYTES
        token, size, dy = load_vector(at), load_vector(at + _DELTA), load_vector(at + _DY)
        b_row, c_row = B + step * row_bytes, C + step * row_bytes
        drive, driven, decayed = size * token, splat(0.0), splat(0.0)
        for n in range(states):
            state = own + n * _STATE_BYTES
            record = records + (step * states + n) * _RECORD_BYTES
            g = load_vector(state + _GRADIENT) + dy * load_float(c_row + 4 * n)
            store_vector(products + n * VECTOR_BYTES, g * drive)
            driven = driven + g * load_float(b_row + 4 * n)
            g = g * load_vector(record)
            store_vector(state + _GRADIENT, g)
            through = g * load_vector(record + _BEFORE)
            decayed = decayed + through * load_vector(state)
            store_vector(state + _DA, load_vector(state + _DA) + through * size)
        store_vector(at, size * driven + skip * dy)
        store_vector(at + _DELTA, token * driven + decayed * LN2)
        _add_row_totals(products, states, dB + step * row_bytes)


@function
def _gate_gradients(values, count):
    """dy SiLU(z) in the place of dy, dy SiLU'(z) in that of z."""
    noinline()
    for step in range(count):
        at = values + step * _STEP_BYTES
        z, dy = load_vector(at + _Z), load_vector(at + _DY)
        gate = sigmoid(z)
        store_vector(at + _DY, dy * z * gate)
        store_vector(at + _Z, dy * gate * (z * (splat(1.0) - gate) + 1.0))


@function
def _finish(values, count, use_softplus):
    """The gradients of dt and z in their places.

    Returns:
        The sum of that of dt.
    """
    noinline()
    total = splat(0.0)
    for step in range(count):
        at = values + step * _STEP_BYTES
        ddt = load_vector(at + _DELTA)
        if use_softplus:
            ddt = ddt * sigmoid(load_vector(at + _DT))
        store_vector(at + _DT, ddt)
        store_vector(at + _Z, load_vector(at + _Z) * load_vector(at + _Y))
        total = total + ddt
    return total


@inline
def _add(x, b, k, window, part):
    if x.base:
        at = row(x, b, k, 0) + window.at
        store(at, load(at, window.lanes) + part, window.lanes)


@inline
def _load_chunk(b, k, window, shape, inputs, tokens, dy, kept, values, records):
    states, sources = shape.states, tokens if shape.grid_order else 0
    take(inputs.u, b, k, sources, window, values, _STEP_BYTES)
    take(inputs.dt, b, k, sources, window, values + _DT, _STEP_BYTES)
    take(dy, b, k, tokens, window, values + _DY, _STEP_BYTES)
    if inputs.z.base:
        take(inputs.z, b, k, tokens, window, values + _Z, _STEP_BYTES)
        _gate_gradients(values, window.count)
    source = row(kept, b, k, window.first // CHUNK * states) + window.at
    for n in range(states):
        state = load(source + n * kept.step, window.lanes)
        store_vector(records + n * _RECORD_BYTES + _BEFORE, state)


@inline
def _write_chunk(b, k, window, shape, gradients, tokens, values):
    sources, later = tokens if shape.grid_order else 0, int(k > 0)
    shared = later if gradients.u.direction == 0 else 0
    put(gradients.u, b, k, sources, window, values, _STEP_BYTES, shared)
    put(gradients.dt, b, k, sources, window, values + _DT, _STEP_BYTES, 0)
    if gradients.z.base:
        put(gradients.z, b, k, tokens, window, values + _Z, _STEP_BYTES, later)


@inline
def _vector_backward(
    b, k, window, shape, inputs, tokens, dy, kept, gradients, scratch, own, products, records
):
    """A chunk of one vector of channels."""
    states, count = shape.states, window.count
    B, C, dB, dC = _parts_of(scratch, states)
    _load_chunk(b, k, window, shape, inputs, tokens, dy, kept, scratch, records)
    shift = load_parameter(inputs.bias, k, window)
    skip = load_parameter(inputs.D, k, window)
    limit = small_step_limit(own, states, _STATE_BYTES)
    if step_sizes(
        scratch + _DT, scratch + _DELTA, _STEP_BYTES, count, shift, limit, shape.softplus
    ):
        skipped = _replay_in_small_steps(
            count, states, scratch, B, C, dC, skip, own, products, records
        )
    else:
        skipped = _replay(count, states, scratch, B, C, dC, skip, own, products, records)
    _walk_back(count, states, scratch, B, C, dB, skip, own, products, records)
    _add(gradients.D, b, k, window, skipped)
    _add(gradients.bias, b, k, window, _finish(scratch, count, shape.softplus))
    _write_chunk(b, k, window, shape, gradients, tokens, scratch)


@inline
def _block_backward(b, k, block, shape, inputs, dy, kept, gradients, scratch):
    """One direction of one image, for a block of channels."""
    states, channels = shape.states, channels_of(block, shape.channels)
    tokens = tokens_of(shape, k)
    sources = tokens if shape.grid_order else 0
    B, C, dB, dC = _parts_of(scratch, states)
    products = dC + CHUNK * whole_vectors(states) * VECTOR_BYTES
    start = products + LANES * whole_vectors(states) * VECTOR_BYTES
    records = start + BLOCK * states * _STATE_BYTES
    clear(products, LANES * whole_vectors(states))
    clear(start, 3 * BLOCK * states)
    for i, channel in enumerate(channels):
        take_decay_rates(
            inputs.A, k, channel, shape, start + i * states * _STATE_BYTES, _STATE_BYTES
        )
    for first in range((shape.steps - 1) // CHUNK * CHUNK, -1, -CHUNK):
        count = min(CHUNK, shape.steps - first)
        take_whole(inputs.B, b, k, sources, first, count, states, B)
        take_whole(inputs.C, b, k, sources, first, count, states, C)
        clear(dB, 2 * CHUNK * whole_vectors(states))
        for i, channel in enumerate(channels):
            _vector_backward(
                b, k, window_of(first, channel, shape), shape, inputs, tokens, dy, kept,
                gradients, scratch, start + i * states * _STATE_BYTES, products, records,
            )  # fmt: skip
        put_whole(
            gradients.B, b * blocks_of(shape.channels) + block, k, sources, first, count, states, dB
        )
        put_whole(
            gradients.C, b * blocks_of(shape.channels) + block, k, sources, first, count, states, dC
        )
    for i, channel in enumerate(channels):
        window, own = window_of(0, channel, shape), start + i * states * _STATE_BYTES
        to = row(gradients.A, b, k, 0) + window.at
        for n in range(states):
            da = load_vector(own + n * _STATE_BYTES + _DA)
            store(to + n * gradients.A.step, da, window.lanes)


@kernel
def scan_backward_kernel(counter, tasks, scratch, shape, span, inputs, dy, kept, gradients):
    """Writes the gradients; `span` directions make one task."""
    blocks, spans = blocks_of(shape.channels), shape.directions // span
    task = atomic_add(counter)
    while task < tasks:
        b, part, block = task // blocks // spans, task // blocks % spans, task % blocks
        for k in range(part * span, (part + 1) * span):
            _block_backward(b, k, block, shape, inputs, dy, kept, gradients, scratch)
        task = atomic_add(counter)
