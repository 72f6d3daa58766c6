"""The mean over tokens of the normalised output of each direction; and its gradient.

One task is one image and a block of tokens; its sums over tokens are parts, added afterwards.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .._common.numba_jit import kernel, run
from .._common.rows import (
    ONE,
    add,
    add_product,
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
from .._common.simd import LANES, VECTOR_BYTES, atomic_add

_COST = 12
"""Vector operations for each vector of y, backward about twice as many."""


class Tokens(NamedTuple):
    """Tokens L, in `blocks` blocks of `block`, of K directions and D channels."""

    tokens: int
    blocks: int
    block: int
    directions: int
    channels: int
    eps: float


def tokens_of(y: Tensor, eps: float) -> Tokens:
    """How the tokens of y [B, K, L, D] are shared among tasks: whatever the number of threads."""
    directions, tokens, channels = y.shape[1:]
    block = max(16, -(-tokens // 64))
    return Tokens(tokens, -(-tokens // block), block, directions, channels, eps)


@kernel
def pool_forward_kernel(counter, tasks, scratch, shape, y, z, sums):
    """Writes the sums over the tokens of a block; scratch: gate, y and K sums."""
    channels, vectors = shape.channels, whole_vectors(shape.channels)
    size = vectors * VECTOR_BYTES
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


@kernel
def pool_backward_kernel(counter, tasks, scratch, shape, y, z, slant, onto, dy, dz):
    """Writes the gradients of y, added to `onto`, and z.

    `slant` is the gradient of the normalised y, the same at every token.
    """
    channels, vectors = shape.channels, whole_vectors(shape.channels)
    size = vectors * VECTOR_BYTES
    gates, slopes, value = scratch, scratch + size, scratch + 2 * size
    x, g, dgate = value + size, value + 2 * size, value + 3 * size
    fill_row(1.0, vectors, gates)
    task = atomic_add(counter)
    while task < tasks:
        b, start = task // shape.blocks, task % shape.blocks * shape.block
        for token in range(start, min(shape.tokens, start + shape.block)):
            if z.base:
                take_row(row(z, b, 0, token), channels, gates)
                gate(gates, vectors, gates, slopes)
                fill_row(0.0, vectors, dgate)
            for k in range(shape.directions):
                take_row(row(y, b, k, token), channels, value)
                multiply(value, gates, ONE, vectors, x)
                scale = normalize(x, channels, shape.eps, True)
                take_row(row(slant, b, k, 0), channels, g)
                normalize_backward(g, x, channels, scale, True)
                if z.base:
                    add_product(g, value, ONE, vectors, dgate)
                    multiply(g, gates, ONE, vectors, g)
                if onto.base:
                    take_row(row(onto, b, k, token), channels, x)
                    add(x, vectors, g)
                put_row(g, channels, row(dy, b, k, token))
            if z.base:
                multiply(dgate, slopes, ONE, vectors, dgate)
                put_row(dgate, channels, row(dz, b, 0, token))
        task = atomic_add(counter)


def pool_forward(y, z, eps):
    """See `ops.backends`."""
    batch, directions, tokens, channels = y.shape
    shape = tokens_of(y, eps)
    y, z = floats(y), floats(z)
    sums = torch.empty(batch * shape.blocks, directions, channels, dtype=torch.float32)
    run(
        pool_forward_kernel,
        batch * shape.blocks,
        y.numel() // LANES * _COST,
        (2 + directions) * LANES * -(-channels // LANES),
        shape,
        rows(y),
        rows(z, "bt"),
        rows(sums, "bk"),
    )
    return sums.view(batch, shape.blocks, directions, channels).sum(1).div_(tokens)


def pool_backward(dmeans, y, z, eps, onto=None):
    """See `ops.backends`."""
    batch, _, tokens, channels = y.shape
    shape = tokens_of(y, eps)
    slant = (dmeans.float() / tokens).contiguous()
    values, gates, onto = floats(y), floats(z), floats(onto)
    dy, dz = (
        torch.empty(y.shape, dtype=torch.float32),
        None if z is None else torch.empty(z.shape, dtype=torch.float32),
    )
    run(
        pool_backward_kernel,
        batch * shape.blocks,
        y.numel() // LANES * 2 * _COST,
        6 * LANES * -(-channels // LANES),
        shape,
        rows(values),
        rows(gates, "bt"),
        rows(slant, "bk"),
        rows(onto),
        rows(dy),
        rows(dz, "bt"),
    )
    return dy.to(y.dtype), None if z is None else dz.to(z.dtype)
