"""Pooling, weighted sum, norm and gate on a CPU (Numba); SCAttn's linear layers are PyTorch's.

A task is one image and a block of tokens. Its sums over tokens are partial sums, which are added
afterwards, so that a result does not depend on the number of threads.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._common.numba_jit import inline, kernel, run
from .._common.registration import in_dtypes
from .._common.rows import (
    ONE,
    Rows,
    add,
    add_product,
    dot,
    fill_row,
    floats,
    gate,
    multiply,
    normalize,
    normalize_backward,
    put_row,
    row,
    rows,
    take_row,
)
from .._common.simd import LANES, VECTOR_BYTES, atomic_add, load_float, store_float
from .reference import CombineInputs, SCAttnInputs, SCAttnParameters
from .reference import weights_forward as weights_forward

_POOL_COST, _COMBINE_COST = 12, 6
"""Vector operations per vector of y, forward; backward takes about twice as many."""


class _Shape(NamedTuple):
    """Sizes that the kernels take: `tokens` are split into `blocks` of `block`.

    A row of `channels` takes `vectors` and `row_bytes` of scratch memory.
    """

    tokens: int
    blocks: int
    block: int
    directions: int
    channels: int
    vectors: int
    row_bytes: int
    eps: float


class _CombineRows(NamedTuple):
    """Rows of the tensors of `CombineInputs`, or of their gradients.

    Token weights are [B, K, L, 1]. The gradients of channel weights and of the norm's parameters
    are partial sums, [B * blocks, K, D] and [B * blocks, D].
    """

    y: Rows
    channel_weights: Rows
    token_weights: Rows
    z: Rows
    norm_weight: Rows
    norm_bias: Rows


def _shape_of(y: Tensor, eps: float) -> _Shape:
    directions, tokens, channels = y.shape[1:]
    block, vectors = max(16, -(-tokens // 64)), -(-channels // LANES)
    blocks, row_bytes = -(-tokens // block), vectors * VECTOR_BYTES
    return _Shape(tokens, blocks, block, directions, channels, vectors, row_bytes, eps)


def _run(
    kernel: Callable[..., Any],
    y: Tensor,
    shape: _Shape,
    cost: int,
    scratch_rows: int,
    *arguments: Any,
) -> None:
    """Runs a kernel on the blocks of all images, with scratch memory for each thread."""
    tasks, operations = y.shape[0] * shape.blocks, y.numel() // LANES * cost
    run(kernel, tasks, operations, scratch_rows * LANES * shape.vectors, shape, *arguments)


@kernel
def _pool_forward_kernel(counter, tasks, scratch, shape, y, z, sums):
    """Writes the sums over a block's tokens. Scratch rows: gate, y and K sums."""
    channels, vectors, size = shape.channels, shape.vectors, shape.row_bytes
    gates, x, parts = scratch, scratch + size, scratch + 2 * size
    task = atomic_add(counter)
    while task < tasks:
        b, start = task // shape.blocks, task % shape.blocks * shape.block
        fill_row(0.0, shape.directions * vectors, parts)
        for token in range(start, min(shape.tokens, start + shape.block)):
            if z.base:
                take_row(row(z, b, 0, token), channels, gates)
                gate(gates, vectors, gates, x)
            for k in range(shape.directions):
                take_row(row(y, b, k, token), channels, x)
                if z.base:
                    multiply(x, gates, ONE, vectors, x)
                normalize(x, channels, shape.eps, True)
                add(x, vectors, parts + k * size)
        for k in range(shape.directions):
            put_row(parts + k * size, channels, row(sums, task, k, 0))
        task = atomic_add(counter)


def pool_forward(y: Tensor, z: Tensor | None, eps: float) -> Tensor:
    batch, directions, tokens, channels = y.shape
    shape = _shape_of(y, eps)
    values, gates = floats(y), floats(z)
    sums = torch.empty(batch * shape.blocks, directions, channels, dtype=torch.float32)
    arguments = rows(values), rows(gates, "bt"), rows(sums, "bk")
    _run(_pool_forward_kernel, y, shape, _POOL_COST, 2 + directions, *arguments)
    return sums.view(batch, shape.blocks, directions, channels).sum(1).div_(tokens)


@kernel
def _pool_backward_kernel(counter, tasks, scratch, shape, y, z, dnormed, onto, dy, dz):
    """Writes the gradients of y, added to `onto`, and of z.

    `dnormed` is the gradient of the normalized y, the same at every token. Six scratch rows.
    """
    channels, vectors, size = shape.channels, shape.vectors, shape.row_bytes
    gates, gate_grads, value = scratch, scratch + size, scratch + 2 * size
    x, g, dgate = value + size, value + 2 * size, value + 3 * size
    fill_row(1.0, vectors, gates)
    task = atomic_add(counter)
    while task < tasks:
        b, start = task // shape.blocks, task % shape.blocks * shape.block
        for token in range(start, min(shape.tokens, start + shape.block)):
            if z.base:
                take_row(row(z, b, 0, token), channels, gates)
                gate(gates, vectors, gates, gate_grads)
                fill_row(0.0, vectors, dgate)
            for k in range(shape.directions):
                take_row(row(y, b, k, token), channels, value)
                multiply(value, gates, ONE, vectors, x)
                scale = normalize(x, channels, shape.eps, True)
                take_row(row(dnormed, b, k, 0), channels, g)
                normalize_backward(g, x, channels, scale, True)
                if z.base:
                    add_product(g, value, ONE, vectors, dgate)
                    multiply(g, gates, ONE, vectors, g)
                if onto.base:
                    take_row(row(onto, b, k, token), channels, x)
                    add(x, vectors, g)
                put_row(g, channels, row(dy, b, k, token))
            if z.base:
                multiply(dgate, gate_grads, ONE, vectors, dgate)
                put_row(dgate, channels, row(dz, b, 0, token))
        task = atomic_add(counter)


def pool_backward(
    dmeans: Tensor, y: Tensor, z: Tensor | None, eps: float, onto: Tensor | None = None
) -> list[Tensor | None]:
    shape = _shape_of(y, eps)
    dnormed = (dmeans.float() / shape.tokens).contiguous()
    values, gates, onto = floats(y), floats(z), floats(onto)
    dy = torch.empty(y.shape, dtype=torch.float32)
    dz = None if z is None else torch.empty(z.shape, dtype=torch.float32)
    inputs = rows(values), rows(gates, "bt"), rows(dnormed, "bk"), rows(onto)
    outputs = rows(dy), rows(dz, "bt")
    _run(_pool_backward_kernel, y, shape, 2 * _POOL_COST, 6, *inputs, *outputs)
    return in_dtypes((dy, dz), (y, z))


@inline
def _take_weights(inputs, b, shape, to):
    """Copies an image's channel weights to scratch memory, or ones; then the norm's parameters."""
    channels, vectors, size = shape.channels, shape.vectors, shape.row_bytes
    for k in range(shape.directions):
        if inputs.channel_weights.base:
            take_row(row(inputs.channel_weights, b, k, 0), channels, to + k * size)
        else:
            fill_row(1.0, vectors, to + k * size)
    if inputs.norm_weight.base:
        take_row(inputs.norm_weight.base, channels, to + shape.directions * size)
        take_row(inputs.norm_bias.base, channels, to + (shape.directions + 1) * size)


@inline
def _token_weight(weights, b, k, token):
    return load_float(row(weights, b, k, token)) if weights.base else ONE


@inline
def _weighted_sum(inputs, b, token, shape, weights, value, to):
    channels, vectors, size = shape.channels, shape.vectors, shape.row_bytes
    fill_row(0.0, vectors, to)
    for k in range(shape.directions):
        take_row(row(inputs.y, b, k, token), channels, value)
        factor = _token_weight(inputs.token_weights, b, k, token)
        add_product(value, weights + k * size, factor, vectors, to)


@kernel
def _combine_forward_kernel(counter, tasks, scratch, shape, inputs, out):
    """Writes the result. Scratch rows: gate, y, sum, channel weights, norm weight and bias."""
    channels, vectors, size = shape.channels, shape.vectors, shape.row_bytes
    gates, value, x = scratch, scratch + size, scratch + 2 * size
    weights = scratch + 3 * size
    norm_weight = weights + shape.directions * size
    task = atomic_add(counter)
    while task < tasks:
        b, start = task // shape.blocks, task % shape.blocks * shape.block
        _take_weights(inputs, b, shape, weights)
        for token in range(start, min(shape.tokens, start + shape.block)):
            _weighted_sum(inputs, b, token, shape, weights, value, x)
            if inputs.norm_weight.base:
                normalize(x, channels, shape.eps, True)
                multiply(x, norm_weight, ONE, vectors, x)
                add(norm_weight + size, vectors, x)
            if inputs.z.base:
                take_row(row(inputs.z, b, 0, token), channels, gates)
                gate(gates, vectors, gates, value)
                multiply(x, gates, ONE, vectors, x)
            put_row(x, channels, row(out, b, 0, token))
        task = atomic_add(counter)


def _input_rows(inputs: CombineInputs) -> tuple[_CombineRows, list[Tensor | None]]:
    """Returns the rows of the inputs, and the tensors that must stay alive while they are used."""
    token_weights = None if inputs.token_weights is None else inputs.token_weights[..., None]
    tensors = [floats(x) for x in inputs._replace(token_weights=token_weights)[:-1]]
    axes = ("bkt", "bk", "bkt", "bt", "", "")
    return _CombineRows(*(rows(x, names) for x, names in zip(tensors, axes, strict=True))), tensors


def combine_forward(inputs: CombineInputs) -> Tensor:
    y, shape = inputs.y, _shape_of(inputs.y, inputs.eps)
    input_rows, _alive = _input_rows(inputs)
    out = torch.empty(y.shape[0], shape.tokens, shape.channels, dtype=torch.float32)
    arguments = input_rows, rows(out, "bt")
    _run(_combine_forward_kernel, y, shape, _COMBINE_COST, 5 + shape.directions, *arguments)
    return out.to(y.dtype)


@inline
def _gate_and_norm_backward(b, token, shape, inputs, gradients, scratch, weights, parts, g):
    """Replaces the gradient of the result, in `g`, by that of the weighted sum."""
    channels, vectors, size = shape.channels, shape.vectors, shape.row_bytes
    gates, dz, value = scratch, scratch + size, scratch + 2 * size
    x, normed = scratch + 3 * size, scratch + 4 * size
    norm_weight, scale = weights + shape.directions * size, ONE
    if inputs.z.base or inputs.norm_weight.base:
        _weighted_sum(inputs, b, token, shape, weights, value, x)
    if inputs.norm_weight.base:
        scale = normalize(x, channels, shape.eps, True)
    if inputs.z.base:
        take_row(row(inputs.z, b, 0, token), channels, gates)
        gate(gates, vectors, gates, dz)
        multiply(g, dz, ONE, vectors, dz)
        if inputs.norm_weight.base:
            multiply(x, norm_weight, ONE, vectors, normed)
            add(norm_weight + size, vectors, normed)
            multiply(dz, normed, ONE, vectors, dz)
        else:
            multiply(dz, x, ONE, vectors, dz)
        put_row(dz, channels, row(gradients.z, b, 0, token))
        multiply(g, gates, ONE, vectors, g)
    if inputs.norm_weight.base:
        add_product(g, x, ONE, vectors, parts + shape.directions * size)
        add(g, vectors, parts + (shape.directions + 1) * size)
        multiply(g, norm_weight, ONE, vectors, g)
        normalize_backward(g, x, channels, scale, True)


@inline
def _sum_backward(b, token, shape, inputs, gradients, weights, parts, value, g):
    """Computes the gradients of y and its weights from that of the weighted sum, in `g`."""
    channels, vectors, size = shape.channels, shape.vectors, shape.row_bytes
    for k in range(shape.directions):
        factor = _token_weight(inputs.token_weights, b, k, token)
        take_row(row(inputs.y, b, k, token), channels, value)
        if gradients.channel_weights.base:
            add_product(g, value, factor, vectors, parts + k * size)
        if gradients.token_weights.base:
            dweight = dot(g, value, weights + k * size, vectors)
            store_float(row(gradients.token_weights, b, k, token), dweight)
        multiply(g, weights + k * size, factor, vectors, value)
        put_row(value, channels, row(gradients.y, b, k, token))


@kernel
def _combine_backward_kernel(counter, tasks, scratch, shape, inputs, dout, gradients):
    """Writes all gradients.

    Scratch rows: six of a token; channel weights, norm weight and bias; sums of their gradients.
    """
    channels, vectors, size = shape.channels, shape.vectors, shape.row_bytes
    value, g, weights = scratch + 2 * size, scratch + 5 * size, scratch + 6 * size
    parts = weights + (shape.directions + 2) * size
    task = atomic_add(counter)
    while task < tasks:
        b, start = task // shape.blocks, task % shape.blocks * shape.block
        _take_weights(inputs, b, shape, weights)
        fill_row(0.0, (shape.directions + 2) * vectors, parts)
        for token in range(start, min(shape.tokens, start + shape.block)):
            take_row(row(dout, b, 0, token), channels, g)
            _gate_and_norm_backward(b, token, shape, inputs, gradients, scratch, weights, parts, g)
            _sum_backward(b, token, shape, inputs, gradients, weights, parts, value, g)
        for k in range(shape.directions):
            if gradients.channel_weights.base:
                put_row(parts + k * size, channels, row(gradients.channel_weights, task, k, 0))
        if gradients.norm_weight.base:
            at = parts + shape.directions * size
            put_row(at, channels, row(gradients.norm_weight, task, 0, 0))
            put_row(at + size, channels, row(gradients.norm_bias, task, 0, 0))
        task = atomic_add(counter)


def combine_backward(dout: Tensor, inputs: CombineInputs) -> list[Tensor | None]:
    y, shape = inputs.y, _shape_of(inputs.y, inputs.eps)
    (batch, directions, tokens, channels), tasks = y.shape, y.shape[0] * shape.blocks
    input_rows, _alive = _input_rows(inputs)
    given, dout_floats = inputs[:-1], floats(dout)
    sizes = (
        y.shape, (tasks, directions, channels), (batch, directions, tokens, 1),
        (batch, tokens, channels), (tasks, channels), (tasks, channels),
    )  # fmt: skip
    gradients = [
        None if x is None else torch.empty(size, dtype=torch.float32)
        for x, size in zip(given, sizes, strict=True)
    ]
    axes = ("bkt", "bk", "bkt", "bt", "b", "b")
    gradient_rows = _CombineRows(*(rows(x, a) for x, a in zip(gradients, axes, strict=True)))
    arguments = input_rows, rows(dout_floats, "bt"), gradient_rows
    scratch_rows = 10 + 2 * directions
    _run(_combine_backward_kernel, y, shape, 2 * _COMBINE_COST, scratch_rows, *arguments)
    dy, dchannel, dtoken, dz, dnorm_weight, dnorm_bias = gradients
    if dchannel is not None:
        dchannel = dchannel.view(batch, shape.blocks, directions, channels).sum(1)
    if dtoken is not None:
        dtoken = dtoken.squeeze(-1)
    dnorm = (None if x is None else x.sum(0) for x in (dnorm_weight, dnorm_bias))
    return in_dtypes((dy, dchannel, dtoken, dz, *dnorm), given)


def weights_backward(
    dweights: Tensor, means: Tensor, weights: Tensor, reduced: Tensor, parameters: SCAttnParameters
) -> tuple[Tensor, list[Tensor]]:
    pooled = torch.addcmul(parameters.pool_bias, means, parameters.pool_weight).flatten(0, -2)
    reduced = reduced.flatten(0, -2)
    dlogits = (dweights * weights * (1 - weights)).flatten(0, -2)
    dreduced = torch.ops.aten.gelu_backward(dlogits @ parameters.select_weight, reduced)
    dpooled = (dreduced @ parameters.reduce_weight).view_as(means)
    return dpooled * parameters.pool_weight, [
        (dpooled * means).sum((0, 1)),
        dpooled.sum((0, 1)),
        dreduced.t() @ pooled,
        dreduced.sum(0),
        dlogits.t() @ F.gelu(reduced),
        dlogits.sum(0),
    ]


def scattn_backward(
    dout: Tensor, means: Tensor, weights: Tensor, reduced: Tensor, inputs: SCAttnInputs
) -> list[Tensor | None]:
    dy, dweights, _, dz, *dnorm = combine_backward(dout, inputs.combine_inputs(weights))
    assert dweights is not None
    dmeans, dparameters = weights_backward(dweights, means, weights, reduced, inputs.parameters())
    dy, dgate = pool_backward(dmeans, *inputs.pool_inputs(), onto=dy)
    if dz is not None and dgate is not None:
        dz = dz.add_(dgate)
    return in_dtypes((dy, dz, *dparameters, *dnorm), inputs[:10])
