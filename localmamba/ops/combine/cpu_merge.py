"""The weighed sum over directions, normalised and gated; and its gradient.

One task is one image and a block of tokens; its sums over tokens are parts, added afterwards.
"""

from typing import NamedTuple

import torch

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
    whole_vectors,
)
from .._common.simd import LANES, VECTOR_BYTES, atomic_add, load_float, store_float
from .cpu_pool import tokens_of

_COST = 6
"""Vector operations for each vector of y, backward about twice as many."""


class Inputs(NamedTuple):
    """The rows of what is merged; the token weights as [B, K, L, 1]."""

    y: Rows
    channel_weights: Rows
    token_weights: Rows
    z: Rows
    norm_weight: Rows
    norm_bias: Rows


class Gradients(NamedTuple):
    """The rows of the gradients; sums over tokens are parts, [B * blocks, K or 1, 1, D]."""

    y: Rows
    channel_weights: Rows
    token_weights: Rows
    z: Rows
    norm_weight: Rows
    norm_bias: Rows


@inline
def _token_weight(weights, b, k, token):
    return load_float(row(weights, b, k, token)) if weights.base else ONE


@inline
def _take_weights(inputs, b, shape, to):
    """Copies an image's channel weights to scratch memory, or ones; then those of the norm."""
    channels, vectors = shape.channels, whole_vectors(shape.channels)
    size = vectors * VECTOR_BYTES
    for k in range(shape.directions):
        if inputs.channel_weights.base:
            take_row(row(inputs.channel_weights, b, k, 0), channels, to + k * size)
        else:
            fill_row(1.0, vectors, to + k * size)
    if inputs.norm_weight.base:
        take_row(inputs.norm_weight.base, channels, to + shape.directions * size)
        take_row(inputs.norm_bias.base, channels, to + (shape.directions + 1) * size)


@inline
def _weighed_sum(inputs, b, token, shape, weights, value, to):
    channels, vectors = shape.channels, whole_vectors(shape.channels)
    size = vectors * VECTOR_BYTES
    fill_row(0.0, vectors, to)
    for k in range(shape.directions):
        take_row(row(inputs.y, b, k, token), channels, value)
        factor = _token_weight(inputs.token_weights, b, k, token)
        add_product(value, weights + k * size, factor, vectors, to)


@kernel
def merge_forward_kernel(counter, tasks, scratch, shape, inputs, out):
    """Scratch: gate, y, sum, channel weights, norm weight and bias."""
    channels, vectors = shape.channels, whole_vectors(shape.channels)
    size = vectors * VECTOR_BYTES
    gates, value, x = scratch, scratch + size, scratch + 2 * size
    weights = scratch + 3 * size
    norm_weight = weights + shape.directions * size
    task = atomic_add(counter)
    while task < tasks:
        b, start = task // shape.blocks, task % shape.blocks * shape.block
        _take_weights(inputs, b, shape, weights)
        for token in range(start, min(shape.tokens, start + shape.block)):
            _weighed_sum(inputs, b, token, shape, weights, value, x)
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


@inline
def _through_gate_and_norm(b, token, shape, inputs, gradients, task, scratch, weights, parts, g):
    """Turns the gradient of the result, in `g`, into that of the weighed sum."""
    channels, vectors = shape.channels, whole_vectors(shape.channels)
    size = vectors * VECTOR_BYTES
    gates, slopes, value = scratch, scratch + size, scratch + 2 * size
    x, normed = scratch + 3 * size, scratch + 4 * size
    norm_weight, scale = weights + shape.directions * size, ONE
    if inputs.z.base or inputs.norm_weight.base:
        _weighed_sum(inputs, b, token, shape, weights, value, x)
    if inputs.norm_weight.base:
        scale = normalize(x, channels, shape.eps, True)
    if inputs.z.base:
        take_row(row(inputs.z, b, 0, token), channels, gates)
        gate(gates, vectors, gates, slopes)
        multiply(g, slopes, ONE, vectors, slopes)
        if inputs.norm_weight.base:
            multiply(x, norm_weight, ONE, vectors, normed)
            add(norm_weight + size, vectors, normed)
            multiply(slopes, normed, ONE, vectors, slopes)
        else:
            multiply(slopes, x, ONE, vectors, slopes)
        put_row(slopes, channels, row(gradients.z, b, 0, token))
        multiply(g, gates, ONE, vectors, g)
    if inputs.norm_weight.base:
        add_product(g, x, ONE, vectors, parts + shape.directions * size)
        add(g, vectors, parts + (shape.directions + 1) * size)
        multiply(g, norm_weight, ONE, vectors, g)
        normalize_backward(g, x, channels, scale, True)


@inline
def _token_backward(b, token, shape, inputs, gradients, weights, parts, value, g):
    """Shares the gradient of the weighed sum among the directions and their weights."""
    channels, vectors = shape.channels, whole_vectors(shape.channels)
    size = vectors * VECTOR_BYTES
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
def merge_backward_kernel(counter, tasks, scratch, shape, inputs, dout, gradients):
    """Scratch: seven rows, channel weights, norm weight and bias, sums of their gradients."""
    channels, vectors = shape.channels, whole_vectors(shape.channels)
    size = vectors * VECTOR_BYTES
    value, g, weights = scratch + 2 * size, scratch + 5 * size, scratch + 6 * size
    parts = weights + (shape.directions + 2) * size
    task = atomic_add(counter)
    while task < tasks:
        b, start = task // shape.blocks, task % shape.blocks * shape.block
        _take_weights(inputs, b, shape, weights)
        fill_row(0.0, (shape.directions + 2) * vectors, parts)
        for token in range(start, min(shape.tokens, start + shape.block)):
            take_row(row(dout, b, 0, token), channels, g)
            _through_gate_and_norm(
                b, token, shape, inputs, gradients, task, scratch, weights, parts, g
            )
            _token_backward(b, token, shape, inputs, gradients, weights, parts, value, g)
        for k in range(shape.directions):
            if gradients.channel_weights.base:
                put_row(parts + k * size, channels, row(gradients.channel_weights, task, k, 0))
        if gradients.norm_weight.base:
            at = parts + shape.directions * size
            put_row(at, channels, row(gradients.norm_weight, task, 0, 0))
            put_row(at + size, channels, row(gradients.norm_bias, task, 0, 0))
        task = atomic_add(counter)


def _arguments(y, channel_weights, token_weights, z, norm_weight, norm_bias, eps):
    """What the kernels see of the inputs, and the tensors behind it."""
    if token_weights is not None:
        token_weights = token_weights[..., None]
    given = (y, channel_weights, token_weights, z, norm_weight, norm_bias)
    tensors = [floats(x) for x in given]
    axes = ("bkt", "bk", "bkt", "bt", "", "")
    inputs = Inputs(*(rows(x, names) for x, names in zip(tensors, axes, strict=True)))
    return tokens_of(y, eps), inputs, tensors


def combine_forward(y, channel_weights, token_weights, z, norm_weight, norm_bias, eps):
    """See `ops.backends`."""
    shape, inputs, _alive = _arguments(
        y, channel_weights, token_weights, z, norm_weight, norm_bias, eps
    )
    out = torch.empty(y.shape[0], shape.tokens, shape.channels, dtype=torch.float32)
    run(
        merge_forward_kernel,
        y.shape[0] * shape.blocks,
        y.numel() // LANES * _COST,
        (5 + shape.directions) * LANES * -(-shape.channels // LANES),
        shape,
        inputs,
        rows(out, "bt"),
    )
    return out.to(y.dtype)


def combine_backward(dout, y, channel_weights, token_weights, z, norm_weight, norm_bias, eps):
    """See `ops.backends`."""
    given = (y, channel_weights, token_weights, z, norm_weight, norm_bias)
    shape, inputs, _alive = _arguments(*given, eps)
    dout, parts = floats(dout), y.shape[0] * shape.blocks
    sizes = (
        y.shape,
        (parts, shape.directions, shape.channels),
        (*y.shape[:3], 1),
        (y.shape[0], shape.tokens, shape.channels),
        (parts, shape.channels),
        (parts, shape.channels),
    )
    gradients = [
        None if x is None else torch.empty(size, dtype=torch.float32)
        for x, size in zip(given, sizes, strict=True)
    ]
    axes = ("bkt", "bk", "bkt", "bt", "b", "b")
    run(
        merge_backward_kernel,
        parts,
        y.numel() // LANES * 2 * _COST,
        (10 + 2 * shape.directions) * LANES * -(-shape.channels // LANES),
        shape,
        inputs,
        rows(dout, "bt"),
        Gradients(*(rows(x, names) for x, names in zip(gradients, axes, strict=True))),
    )
    if channel_weights is not None:
        gradients[1] = gradients[1].view(y.shape[0], shape.blocks, *sizes[1][1:]).sum(1)
    if token_weights is not None:
        gradients[2] = gradients[2].squeeze(-1)
    if norm_weight is not None:
        gradients[4:] = [x.sum(0) for x in gradients[4:]]
    return in_dtypes(gradients, given)
