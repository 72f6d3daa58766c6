"""CPU kernels of the selective scan: Numba, on vectors of channels.

Forward, one task is one image, one direction and a block of channels; backward one image, a block
of channels and one direction, or all directions one after another where they add to one gradient
(of a u or a z that they share). A task takes the scan chunk by chunk, so that all it works on stays
in the L1 cache; what is used together is adjacent there, as two arrays a multiple of 4096 bytes
apart would evict each other. Backward goes from the last chunk to the first: each is replayed from
its kept states, its decays and states written down, and then walked backwards.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._common.backends import CHUNK
from .._common.numba_jit import function, inline, kernel, run
from .._common.registration import in_dtypes
from .._common.rows import (
    NOTHING,
    Rows,
    Window,
    clear,
    floats,
    int32_index,
    load,
    put,
    put_whole,
    row,
    rows,
    store,
    take,
    take_columns,
    take_whole,
    whole_vectors,
)
from .._common.simd import (
    LANES,
    LN2,
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
    row_totals,
    sigmoid,
    silu,
    softplus,
    splat,
    store_vector,
)
from .reference import ScanInputs, align_weights, side_by_side

__all__ = ["align_weights", "scan_backward", "scan_forward"]

BLOCK = 4
"""Vectors of channels in a task."""


class InputRows(NamedTuple):
    """The rows of the scan's inputs, or of their gradients.

    Gradients of parameters are one part per image, to be added; those of B and C one part per block
    of channels: their rows count blocks times images.
    """

    u: Rows
    dt: Rows
    A: Rows
    B: Rows
    C: Rows
    D: Rows
    z: Rows
    bias: Rows


class Shape(NamedTuple):
    """Sizes of a scan, and where its index stands."""

    orders: int
    """Address of the scan orders, int32 [K, P]; 0 without."""
    directions: int
    steps: int
    channels: int
    states: int
    grid_order: int
    """Whether u, dt, B and C stand in grid order."""
    softplus: int
    """Whether step sizes pass through softplus."""


@inline
def tokens_of(shape, k):
    """Returns the address of a direction's scan order; 0 without an index."""
    return shape.orders + 4 * k * shape.steps if shape.orders else 0


@inline
def window_of(first, channel, shape):
    """Returns the chunk from step `first` on, of the vector from `channel` on."""
    count, lanes = min(CHUNK, shape.steps - first), min(LANES, shape.channels - channel)
    return Window(first, count, 4 * channel, lanes)


@inline
def blocks_of(channels):
    """Returns the number of blocks that hold the channels."""
    return (channels + BLOCK * LANES - 1) // (BLOCK * LANES)


@inline
def channels_of(block, channels):
    """Returns the first channel of each vector of a block."""
    start = block * BLOCK * LANES
    return range(start, min(channels, start + BLOCK * LANES), LANES)


@inline
def take_decay_rates(A, k, channel, shape, to, to_bytes):
    """Loads A of a vector of channels, times log2(e), as `states` vectors."""
    take_columns(A, k, channel, shape.channels, shape.states, to, to_bytes)
    for n in range(shape.states):
        store_vector(to + n * to_bytes, load_vector(to + n * to_bytes) * LOG2E)


@inline
def small_step_limit(rates, states, rate_bytes):
    """Returns the step size up to which `exp2_of_small_product` serves, as a vector."""
    largest = splat(0.0)
    for n in range(states):
        largest = maximum(abs(load_vector(rates + n * rate_bytes)), largest)
    return splat(126.0) / largest


@function
def step_sizes(dt, delta, step_bytes, count, shift, limit, use_softplus):
    """Adds the bias to dt, writes step sizes to `delta`, returns whether all are below `limit`."""
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


@inline
def load_parameter(x, k, window):
    """Loads a vector of a parameter [K, D]; zeros if it is not given."""
    return load(row(x, 0, k, 0) + window.at, window.lanes) if x.base else splat(0.0)


# Bytes of a step, u (then y) and dt (then z), and of a state, its decay rate and value.
_FORWARD_STEP, _FORWARD_STATE = 2 * VECTOR_BYTES, 2 * VECTOR_BYTES


def _make_advance(power: Callable[..., Any]) -> Any:
    @function
    def advance(count, states, values, B, C, skip, own):
        """Advances the states through a chunk and writes its outputs in the place of u."""
        noinline()
        row_bytes = whole_vectors(states) * VECTOR_BYTES
        for step in range(count):
            at = values + step * _FORWARD_STEP
            token, size = load_vector(at), load_vector(at + VECTOR_BYTES)
            b_row, c_row = B + step * row_bytes, C + step * row_bytes
            drive, out = size * token, skip * token
            for n in range(states):
                rate = own + n * _FORWARD_STATE
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
        at = values + step * _FORWARD_STEP
        store_vector(at, load_vector(at) * silu(load_vector(at + VECTOR_BYTES)))


@inline
def _scan_vector(b, k, window, shape, inputs, tokens, y, values, B, C, own):
    """Scans a chunk of one vector of channels."""
    delta, count = values + VECTOR_BYTES, window.count
    sources = tokens if shape.grid_order else 0
    take(inputs.u, b, k, sources, window, values, _FORWARD_STEP)
    take(inputs.dt, b, k, sources, window, delta, _FORWARD_STEP)
    shift = load_parameter(inputs.bias, k, window)
    skip = load_parameter(inputs.D, k, window)
    limit = small_step_limit(own, shape.states, _FORWARD_STATE)
    if step_sizes(delta, delta, _FORWARD_STEP, count, shift, limit, shape.softplus):
        _advance_in_small_steps(count, shape.states, values, B, C, skip, own)
    else:
        _advance(count, shape.states, values, B, C, skip, own)
    if inputs.z.base:
        take(inputs.z, b, k, tokens, window, delta, _FORWARD_STEP)
        _gate(values, count)
    put(y, b, k, tokens, window, values, _FORWARD_STEP, 0)


@inline
def _scan_block(b, k, channels, shape, inputs, y, kept, scratch):
    """Scans one direction of one image, for a block of channels."""
    states = shape.states
    tokens = tokens_of(shape, k)
    sources = tokens if shape.grid_order else 0
    b_part = scratch + CHUNK * _FORWARD_STEP
    c_part = b_part + CHUNK * whole_vectors(states) * VECTOR_BYTES
    block = c_part + CHUNK * whole_vectors(states) * VECTOR_BYTES
    for i, channel in enumerate(channels):
        own = block + i * states * _FORWARD_STATE
        take_decay_rates(inputs.A, k, channel, shape, own, _FORWARD_STATE)
        for n in range(states):
            store_vector(own + n * _FORWARD_STATE + VECTOR_BYTES, splat(0.0))
    for first in range(0, shape.steps, CHUNK):
        count = min(CHUNK, shape.steps - first)
        take_whole(inputs.B, b, k, sources, first, count, states, b_part)
        take_whole(inputs.C, b, k, sources, first, count, states, c_part)
        for i, channel in enumerate(channels):
            own = block + i * states * _FORWARD_STATE
            window = window_of(first, channel, shape)
            if kept.base:
                to = row(kept, b, k, first // CHUNK * states) + window.at
                for n in range(states):
                    h = load_vector(own + n * _FORWARD_STATE + VECTOR_BYTES)
                    store(to + n * kept.step, h, window.lanes)
            _scan_vector(b, k, window, shape, inputs, tokens, y, scratch, b_part, c_part, own)


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


# Offsets within a step: u, dt, delta, dy, z and y; their gradients replace u, dt and z.
_DT, _DELTA, _DY, _Z, _Y = (i * VECTOR_BYTES for i in range(1, 6))
_STEP_BYTES = 6 * VECTOR_BYTES

# Offsets within a state on the way back: its decay rate, the gradient that reaches it, that of A.
_GRADIENT, _DA = VECTOR_BYTES, 2 * VECTOR_BYTES
_STATE_BYTES = 3 * VECTOR_BYTES

# Offsets within the record of a state at a step: its decay, and its value before.
_BEFORE, _RECORD_BYTES = VECTOR_BYTES, 2 * VECTOR_BYTES


@inline
def _parts_of(scratch, states):
    """Returns the addresses of B, C, dB and dC of a chunk in scratch memory."""
    size = CHUNK * whole_vectors(states) * VECTOR_BYTES
    B = scratch + CHUNK * _STEP_BYTES
    return B, B + size, B + 2 * size, B + 3 * size


@inline
def _add_row_totals(products, states, to):
    """Adds the total over lanes of each state's product to the row of a step."""
    for i in range(whole_vectors(states)):
        at = to + i * VECTOR_BYTES
        store_vector(at, load_vector(at) + row_totals(products + i * LANES * VECTOR_BYTES))


def _make_replay(power: Callable[..., Any]) -> Any:
    @function
    def replay(count, states, values, B, C, dC, skip, own, products, records):
        """Recomputes decays, states and outputs of a chunk, adds to dC and returns dD."""
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
    """Walks a chunk backwards and writes du and ddelta in the places of u and delta."""
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
    """Writes dy SiLU(z) in the place of dy, and dy SiLU'(z) in that of z."""
    noinline()
    for step in range(count):
        at = values + step * _STEP_BYTES
        z, dy = load_vector(at + _Z), load_vector(at + _DY)
        gate = sigmoid(z)
        store_vector(at + _DY, dy * z * gate)
        store_vector(at + _Z, dy * gate * (z * (splat(1.0) - gate) + 1.0))


@function
def _finish(values, count, use_softplus):
    """Writes the gradients of dt and z in their places and returns the sum of that of dt."""
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
    """Computes the gradients of a chunk of one vector of channels."""
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
    """Computes the gradients of one direction of one image, for a block of channels."""
    states, channels = shape.states, channels_of(block, shape.channels)
    tokens, part = tokens_of(shape, k), b * blocks_of(shape.channels) + block
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
        put_whole(gradients.B, part, k, sources, first, count, states, dB)
        put_whole(gradients.C, part, k, sources, first, count, states, dC)
    for i, channel in enumerate(channels):
        window, own = window_of(0, channel, shape), start + i * states * _STATE_BYTES
        to = row(gradients.A, b, k, 0) + window.at
        for n in range(states):
            da = load_vector(own + n * _STATE_BYTES + _DA)
            store(to + n * gradients.A.step, da, window.lanes)


@kernel
def scan_backward_kernel(counter, tasks, scratch, shape, span, inputs, dy, kept, gradients):
    """Writes the gradients; a task takes `span` directions."""
    blocks, spans = blocks_of(shape.channels), shape.directions // span
    task = atomic_add(counter)
    while task < tasks:
        b, part, block = task // blocks // spans, task // blocks % spans, task % blocks
        for k in range(part * span, (part + 1) * span):
            _block_backward(b, k, block, shape, inputs, dy, kept, gradients, scratch)
        task = atomic_add(counter)


_FORWARD_COST, _BACKWARD_COST = 16, 32
"""Vector operations per state and step."""


def _arguments(inputs: ScanInputs) -> tuple[Shape, InputRows, int, object]:
    """Returns sizes, rows, the number of blocks of channels, and the tensors behind the rows."""
    tensors = [floats(x) for x in inputs.tensors]
    axes = ("bt" if inputs.grid_order else "bkt", "bkt", "kt", "bkt", "bkt", "k", "bt", "k")
    input_rows = InputRows(*(rows(x, names) for x, names in zip(tensors, axes, strict=True)))
    index, address = int32_index(inputs.index)
    directions, channels, states = inputs.A.shape
    order, softplus = int(inputs.grid_order), int(inputs.softplus)
    shape = Shape(address, directions, inputs.steps, channels, states, order, softplus)
    return shape, input_rows, -(-channels // (BLOCK * LANES)), (tensors, index)


def scan_forward(inputs: ScanInputs, save: bool) -> tuple[Tensor, Tensor]:
    shape, input_rows, blocks, _alive = _arguments(inputs)
    sequences = (inputs.u.shape[0], shape.directions)
    y = torch.empty(*sequences, inputs.length, shape.channels, dtype=torch.float32)
    chunks = -(-shape.steps // CHUNK) if save else 0
    kept = torch.empty(*sequences, chunks * shape.states, shape.channels, dtype=torch.float32)
    tasks = sequences[0] * shape.directions * blocks
    run(
        scan_forward_kernel,
        tasks,
        tasks * BLOCK * shape.steps * shape.states * _FORWARD_COST,
        # Floats of u, dt, B and C of a chunk, and of decay rates and states of a block.
        2 * LANES * (CHUNK + CHUNK * -(-shape.states // LANES) + BLOCK * shape.states),
        shape,
        input_rows,
        rows(y),
        rows(kept) if save else NOTHING,
    )
    return y.to(inputs.u.dtype), kept.flatten(2)


def scan_backward(
    dy: Tensor, inputs: ScanInputs, states: Tensor, dBC: Tensor | None = None
) -> list[Tensor | None]:
    if states.shape[2] == 0:  # the forward pass was told not to keep any
        _, states = scan_forward(inputs, save=True)
    shape, input_rows, blocks, _alive = _arguments(inputs)
    u, dt, _, B, C, D, z, dt_bias = inputs.tensors
    batch, dy_floats = inputs.u.shape[0], floats(dy)

    def empty_like(x: Tensor | None, *first: int) -> Tensor | None:
        return None if x is None else torch.empty(*first, *x.shape[1:], dtype=torch.float32)

    def zeros(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.zeros((batch, *x.shape), dtype=torch.float32)

    dA = torch.empty(batch, shape.directions, shape.states, shape.channels, dtype=torch.float32)
    du, ddt, dz = (empty_like(x, batch) for x in (u, dt, z))
    dB, dC = (empty_like(x, batch * blocks) for x in (B, C))
    dD, ddt_bias = zeros(D), zeros(dt_bias)
    axes = ("bt" if inputs.grid_order else "bkt", "bkt", "bkt", "bkt", "bkt", "bk", "bt", "bk")
    gradients = zip((du, ddt, dA, dB, dC, dD, dz, ddt_bias), axes, strict=True)
    span = 1 if not inputs.grid_order and z is None else shape.directions
    wide = -(-shape.states // LANES)
    per_chunk = 6 * CHUNK + 4 * wide * CHUNK + 2 * (CHUNK + 1) * shape.states
    run(
        scan_backward_kernel,
        batch * shape.directions // span * blocks,
        batch * shape.directions * blocks * BLOCK * shape.steps * shape.states * _BACKWARD_COST,
        # Floats of values, B, C, dB, dC and records of a chunk, of products and a block's states.
        LANES * (per_chunk + wide * LANES + 3 * BLOCK * shape.states),
        shape,
        span,
        input_rows,
        rows(dy_floats),
        rows(states.unflatten(2, (-1, shape.channels))),
        InputRows(*(rows(x, names) for x, names in gradients)),
    )
    dB, dC = (x if x is None else x.unflatten(0, (batch, blocks)).sum(1) for x in (dB, dC))
    dB, dC = side_by_side(dB, dC, dBC)
    dD, ddt_bias = (x if x is None else x.sum(0) for x in (dD, ddt_bias))
    return in_dtypes((du, ddt, dA.sum(0).transpose(1, 2), dB, dC, dD, dz, ddt_bias), inputs.tensors)
