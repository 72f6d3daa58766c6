"""CPU kernels of the norm of the residual stream: scale, add, rotate, normalize in one pass.

A task is a block of tokens; sums over tokens are partial sums per task, added afterwards.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._common.numba_jit import kernel, run
from .._common.rows import (
    ONE,
    Rows,
    add,
    add_product,
    fill_row,
    floats,
    multiply,
    normalize,
    normalize_backward,
    put_row,
    rotate,
    row,
    rows,
    scale_row,
    take_row,
    whole_vectors,
)
from .._common.simd import LANES, VECTOR_BYTES, atomic_add, load_float

_COST = 12
"""Vector operations for each vector of tokens, backward about twice as many."""


class _Shape(NamedTuple):
    """Tokens of all images, of a block, of a rotary table, and of an image."""

    tokens: int
    block: int
    length: int
    image: int
    channels: int
    eps: float


class _Parameters(NamedTuple):
    weight: Rows
    bias: Rows
    cos: Rows
    sin: Rows
    scale: Rows


@kernel
def norm_forward_kernel(
    counter, tasks, scratch, shape, hidden, residual, parameters, normed, stream
):
    """Scratch rows: x; residual, then cosines; sines; weight; bias."""
    channels, vectors = shape.channels, whole_vectors(shape.channels)
    size, p = vectors * VECTOR_BYTES, parameters
    x, other, sin = scratch, scratch + size, scratch + 2 * size
    weight, bias = scratch + 3 * size, scratch + 4 * size
    take_row(p.weight.base, channels, weight)
    if p.bias.base:
        take_row(p.bias.base, channels, bias)
    task = atomic_add(counter)
    while task < tasks:
        start = task * shape.block
        for token in range(start, min(shape.tokens, start + shape.block)):
            take_row(row(hidden, 0, 0, token), channels, x)
            if p.scale.base:
                factor = load_float(row(p.scale, 0, 0, token // shape.image))
                scale_row(factor, vectors, x)
            if residual.base:
                take_row(row(residual, 0, 0, token), channels, other)
                add(other, vectors, x)
            if p.cos.base:
                take_row(row(p.cos, 0, 0, token % shape.length), channels, other)
                take_row(row(p.sin, 0, 0, token % shape.length), channels, sin)
                rotate(x, other, sin, ONE, vectors)
            if stream.base:
                put_row(x, channels, row(stream, 0, 0, token))
            normalize(x, channels, shape.eps, p.bias.base != 0)
            multiply(x, weight, ONE, vectors, x)
            if p.bias.base:
                add(bias, vectors, x)
            put_row(x, channels, row(normed, 0, 0, token))
        task = atomic_add(counter)


@kernel
def norm_backward_kernel(
    counter, tasks, scratch, shape, dnormed, dstream, stream, parameters, dhidden, dresidual, sums
):
    """Scratch rows: g; x, then sines; stream's gradient, then cosines; weight; two sums."""
    channels, vectors = shape.channels, whole_vectors(shape.channels)
    size, p = vectors * VECTOR_BYTES, parameters
    g, x, other = scratch, scratch + size, scratch + 2 * size
    weight, parts = scratch + 3 * size, scratch + 4 * size
    take_row(p.weight.base, channels, weight)
    task = atomic_add(counter)
    while task < tasks:
        start = task * shape.block
        fill_row(0.0, 2 * vectors, parts)
        for token in range(start, min(shape.tokens, start + shape.block)):
            take_row(row(dnormed, 0, 0, token), channels, g)
            take_row(row(stream, 0, 0, token), channels, x)
            scale = normalize(x, channels, shape.eps, p.bias.base != 0)
            add_product(g, x, ONE, vectors, parts)
            add(g, vectors, parts + size)
            multiply(g, weight, ONE, vectors, g)
            normalize_backward(g, x, channels, scale, p.bias.base != 0)
            if dstream.base:
                take_row(row(dstream, 0, 0, token), channels, other)
                add(other, vectors, g)
            if p.cos.base:
                take_row(row(p.cos, 0, 0, token % shape.length), channels, other)
                take_row(row(p.sin, 0, 0, token % shape.length), channels, x)
                rotate(g, other, x, -ONE, vectors)
            if dresidual.base:
                put_row(g, channels, row(dresidual, 0, 0, token))
            if p.scale.base:
                factor = load_float(row(p.scale, 0, 0, token // shape.image))
                scale_row(factor, vectors, g)
            put_row(g, channels, row(dhidden, 0, 0, token))
        put_row(parts, channels, row(sums, 0, task, 0))
        put_row(parts + size, channels, row(sums, 0, task, 1))
        task = atomic_add(counter)


def _flat(x: Tensor | None) -> Tensor | None:
    """Tokens of all images as float32 [B * L, C]."""
    return None if x is None else floats(x.reshape(-1, x.shape[-1]))


def _shape(x: Tensor, eps: float) -> tuple[_Shape, int, int]:
    """Returns sizes, tasks (whatever the number of threads), and vectors of a row."""
    length, channels = x.shape[-2:]
    tokens, image = x.shape[:-1].numel(), x.shape[1:-1].numel()
    block = max(16, -(-tokens // 256))
    shape = _Shape(tokens, block, length, image, channels, eps)
    return shape, -(-tokens // block), -(-channels // LANES)


def _parameters(
    weight: Tensor, bias: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    scale: Tensor | None,
) -> tuple[_Parameters, list[Tensor | None]]:  # fmt: skip
    """Returns the parameters' rows, and the tensors that must stay alive."""
    column = None if scale is None else scale[:, None]  # [B, 1]
    tensors = [floats(weight), floats(bias), _flat(cos), _flat(sin), floats(column)]
    axes = ("", "", "t", "t", "t")
    return _Parameters(*(rows(x, names) for x, names in zip(tensors, axes, strict=True))), tensors


def forward(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, scale: Tensor | None, eps: float, dtype: torch.dtype,
    keep_stream: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Runs `norm_forward_kernel`; a layer norm alone is PyTorch's, which is quicker."""
    if not keep_stream and bias is not None and residual is None and cos is None and scale is None:
        x = hidden.contiguous().float()
        return F.layer_norm(x, x.shape[-1:], weight.float(), bias.float(), eps).to(dtype), None
    shape, tasks, vectors = _shape(hidden, eps)
    parameters, _alive = _parameters(weight, bias, cos, sin, scale)
    inputs = [_flat(hidden), _flat(residual)]
    normed = torch.empty(shape.tokens, shape.channels, dtype=torch.float32)
    stream = torch.empty_like(normed) if keep_stream else None
    run(
        norm_forward_kernel, tasks, shape.tokens * vectors * _COST, 5 * vectors * LANES,
        shape, *(rows(x, "t") for x in inputs), parameters, rows(normed, "t"), rows(stream, "t"),
    )  # fmt: skip
    stream = None if stream is None else stream.view(hidden.shape)
    return normed.to(dtype).view(hidden.shape), stream


def backward(
    dnormed: Tensor, dstream: Tensor | None, stream: Tensor, weight: Tensor, bias: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, scale: Tensor | None, eps: float,
    hidden_dtype: torch.dtype, has_residual: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:  # fmt: skip
    shape, tasks, vectors = _shape(stream, eps)
    parameters, _alive = _parameters(weight, bias, cos, sin, scale)
    inputs = [_flat(dnormed), _flat(dstream), _flat(stream)]
    dhidden = torch.empty(shape.tokens, shape.channels, dtype=torch.float32)
    dresidual = torch.empty_like(dhidden) if has_residual else None
    sums = torch.empty(tasks, 2, shape.channels, dtype=torch.float32)
    run(
        norm_backward_kernel, tasks, shape.tokens * vectors * 2 * _COST, 6 * vectors * LANES,
        shape, *(rows(x, "t") for x in inputs), parameters, rows(dhidden, "t"),
        rows(dresidual, "t"), rows(sums, "kt"),
    )  # fmt: skip
    dweight, dbias = sums.sum(0)
    return (
        dhidden.to(hidden_dtype).view(stream.shape),
        None if dresidual is None else dresidual.view(stream.shape),
        dweight.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
    )
