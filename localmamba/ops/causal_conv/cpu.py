"""CPU kernels of the causal convolution along scan orders with SiLU, on vectors of channels.

A task of the forward kernel is a block of channels of one image and direction. Backward it is all
directions, since they add to one gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .._common.backends import CHUNK
from .._common.numba_jit import function, inline, kernel, run
from .._common.rows import Rows, Window, floats, load, put, row, rows, store, take, take_columns
from .._common.simd import (
    LANES,
    VECTOR_BYTES,
    atomic_add,
    load_vector,
    noinline,
    sigmoid,
    silu,
    splat,
    store_vector,
)

BLOCK = 4
"""Vectors of channels in a task."""

_COST = 40
"""Vector operations for each vector and step, backward about twice as many."""

_STEP_BYTES = 3 * VECTOR_BYTES  # x, then dx; u, then du; the gradient before SiLU
_DU, _GRADIENT = VECTOR_BYTES, 2 * VECTOR_BYTES
_TAP_BYTES = 2 * VECTOR_BYTES  # a weight and its gradient


class _Conv(NamedTuple):
    """Sizes; `index` is the address of the scan orders, `blocks` the blocks of channels."""

    index: int  # type: ignore[assignment] # shadows tuple.index
    directions: int
    steps: int
    channels: int
    width: int
    blocks: int


@function
def _before_silu(x, taps, width, bias):
    """The convolution at the step whose first tap reads the row at `x`."""
    total = bias
    for tap in range(width):
        weight = load_vector(taps + tap * _TAP_BYTES)
        total = total + weight * load_vector(x + tap * _STEP_BYTES)
    return total


@function
def _convolve(values, count, taps, width, bias):
    noinline()
    for step in range(count):
        at = values + step * _STEP_BYTES
        store_vector(at + _DU, silu(_before_silu(at, taps, width, bias)))


@function
def _convolve_backward(values, count, taps, width, bias):
    """Writes the gradient before SiLU, adds to those of the weights, returns that of the bias."""
    noinline()
    total = splat(0.0)
    for step in range(count):
        at = values + step * _STEP_BYTES
        x = _before_silu(at, taps, width, bias)
        gate = sigmoid(x)
        g = load_vector(at + _DU) * gate * (x * (splat(1.0) - gate) + 1.0)
        store_vector(at + _GRADIENT, g)
        for tap in range(width):
            to = taps + tap * _TAP_BYTES + VECTOR_BYTES
            store_vector(to, load_vector(to) + g * load_vector(at + tap * _STEP_BYTES))
        total = total + g
    return total


@function
def _convolve_transposed(values, count, taps, width):
    """Writes the gradient of x: each step was read by itself and the steps that follow."""
    noinline()
    for step in range(count):
        at = values + step * _STEP_BYTES
        total = splat(0.0)
        for tap in range(width):
            weight = load_vector(taps + tap * _TAP_BYTES)
            later = at + (width - 1 - tap) * _STEP_BYTES
            total = total + weight * load_vector(later + _GRADIENT)
        store_vector(at, total)


@kernel
def conv_forward_kernel(counter, tasks, scratch, conv, x, weight, bias, u):
    """Writes u in scan order."""
    width, before = conv.width, conv.width - 1
    values = scratch + width * _TAP_BYTES
    task = atomic_add(counter)
    while task < tasks:
        start, rest = task % conv.blocks * BLOCK * LANES, task // conv.blocks
        b, k = rest // conv.directions, rest % conv.directions
        tokens = conv.index + 4 * k * conv.steps
        for channel in range(start, min(conv.channels, start + BLOCK * LANES), LANES):
            lanes, at = min(LANES, conv.channels - channel), 4 * channel
            shift = load(row(bias, 0, k, 0) + at, lanes)
            take_columns(weight, k, channel, conv.channels, width, scratch, _TAP_BYTES)
            for first in range(0, conv.steps, CHUNK):
                count = min(CHUNK, conv.steps - first)
                read = Window(first - before, count + before, at, lanes)
                take(x, b, k, tokens, read, values, _STEP_BYTES)
                _convolve(values, count, scratch, width, shift)
                put(u, b, k, 0, Window(first, count, at, lanes), values + _DU, _STEP_BYTES, 0)
        task = atomic_add(counter)


@inline
def _backward_vector(b, k, channel, conv, du, x, weight, bias, dx, dweight, dbias, scratch):
    width, before, lanes = conv.width, conv.width - 1, min(LANES, conv.channels - channel)
    values, at = scratch + width * _TAP_BYTES, 4 * channel
    tokens = conv.index + 4 * k * conv.steps
    shift, total = load(row(bias, 0, k, 0) + at, lanes), splat(0.0)
    take_columns(weight, k, channel, conv.channels, width, scratch, _TAP_BYTES)
    for tap in range(width):
        store_vector(scratch + tap * _TAP_BYTES + VECTOR_BYTES, splat(0.0))
    for first in range((conv.steps - 1) // CHUNK * CHUNK, -1, -CHUNK):
        count = min(CHUNK, conv.steps - first)
        for step in range(before - 1, -1, -1):  # what follows: nothing, or the chunk just done
            g = values + step * _STEP_BYTES + _GRADIENT
            later = splat(0.0) if first + count == conv.steps else load_vector(g)
            store_vector(g + count * _STEP_BYTES, later)
        window = Window(first, count, at, lanes)
        read = Window(first - before, count + before, at, lanes)
        take(x, b, k, tokens, read, values, _STEP_BYTES)
        take(du, b, k, 0, window, values + _DU, _STEP_BYTES)
        total = total + _convolve_backward(values, count, scratch, width, shift)
        _convolve_transposed(values, count, scratch, width)
        put(dx, b, 0, tokens, window, values, _STEP_BYTES, int(k > 0))
    store(row(dbias, b, k, 0) + at, total, lanes)
    for tap in range(width):
        part = load_vector(scratch + tap * _TAP_BYTES + VECTOR_BYTES)
        store(row(dweight, b, k, tap) + at, part, lanes)


@kernel
def conv_backward_kernel(counter, tasks, scratch, conv, du, x, weight, bias, dx, dweight, dbias):
    """Writes the gradients; those of the parameters one part per image."""
    task = atomic_add(counter)
    while task < tasks:
        b, start = task // conv.blocks, task % conv.blocks * BLOCK * LANES
        for k in range(conv.directions):
            for channel in range(start, min(conv.channels, start + BLOCK * LANES), LANES):
                _backward_vector(
                    b, k, channel, conv, du, x, weight, bias, dx, dweight, dbias, scratch
                )
        task = atomic_add(counter)


def _sizes(x: Tensor, weight: Tensor, index: Tensor) -> tuple[_Conv, int, Tensor]:
    """Returns sizes, floats of scratch memory, and the index that must stay alive."""
    index = index.to(torch.int32).contiguous()
    (directions, steps), channels, width = index.shape, x.shape[2], weight.shape[2]
    blocks = -(-channels // (BLOCK * LANES))
    scratch = LANES * (3 * (CHUNK + width - 1) + 2 * width)
    return _Conv(index.data_ptr(), directions, steps, channels, width, blocks), scratch, index


def _rows(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[list[Rows], list[Tensor | None]]:
    """Returns the rows of the inputs, and the tensors that must stay alive."""
    tensors = [floats(x), floats(weight), floats(bias)]
    return [rows(t, axes) for t, axes in zip(tensors, ("bt", "kt", "k"), strict=True)], tensors


def forward(x: Tensor, weight: Tensor, bias: Tensor, index: Tensor) -> Tensor:
    conv, scratch, _index = _sizes(x, weight, index)
    inputs, _alive = _rows(x, weight, bias)
    shape = conv.directions, x.shape[0], conv.steps, conv.channels
    u = torch.empty(shape, dtype=torch.float32)
    tasks = x.shape[0] * conv.directions * conv.blocks
    cost = tasks * BLOCK * conv.steps * _COST
    run(conv_forward_kernel, tasks, cost, scratch, conv, *inputs, rows(u, "kbt"))
    return u.to(x.dtype).transpose(0, 1)


def backward(
    du: Tensor, x: Tensor, weight: Tensor, bias: Tensor, index: Tensor
) -> list[Tensor | None]:
    conv, scratch, _index = _sizes(x, weight, index)
    inputs, _alive = _rows(x, weight, bias)
    batch, float_du = x.shape[0], floats(du)
    dx = torch.empty(x.shape, dtype=torch.float32)
    dweight = torch.empty(batch, conv.directions, conv.width, conv.channels, dtype=torch.float32)
    dbias = torch.empty(batch, conv.directions, conv.channels, dtype=torch.float32)
    tasks = batch * conv.blocks
    cost = tasks * BLOCK * conv.directions * conv.steps * 2 * _COST
    run(
        conv_backward_kernel, tasks, cost, scratch, conv, rows(float_du), *inputs,
        rows(dx, "bt"), rows(dweight), rows(dbias, "bk"),
    )  # fmt: skip
    dweight = dweight.sum(0).transpose(1, 2)
    return [dx.to(x.dtype), dweight.to(weight.dtype), dbias.sum(0).to(bias.dtype)]
