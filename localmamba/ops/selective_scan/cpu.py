"""The scan's kernels behind the interface of `ops.backends`."""

import torch

from .._common.backends import CHUNK
from .._common.numba_jit import run
from .._common.registration import in_dtypes
from .._common.rows import NOTHING, floats, int32_index, rows
from .._common.simd import LANES
from . import reference
from .cpu_backward import Gradients, backward_scratch, scan_backward_kernel
from .cpu_forward import BLOCK, Inputs, Shape, forward_scratch, scan_forward_kernel
from .reference import side_by_side

_FORWARD_COST, _BACKWARD_COST = 16, 32
"""Vector operations for each state and step."""

align_weights = reference.align_weights


def _arguments(u, dt, A, B, C, D, z, dt_bias, index, softplus):
    """What the kernels see of the inputs, the tensors behind it, and blocks of channels."""
    tensors = [floats(x) for x in (u, dt, A, B, C, D, z, dt_bias)]
    axes = ("bt" if u.dim() == 3 else "bkt", "bkt", "kt", "bkt", "bkt", "k", "bt", "k")
    inputs = Inputs(*(rows(x, names) for x, names in zip(tensors, axes, strict=True)))
    index, address = int32_index(index)
    steps = u.shape[-2] if index is None else index.shape[1]
    directions, channels, states = A.shape
    shape = Shape(address, directions, steps, channels, states, int(u.dim() == 3), int(softplus))
    return shape, inputs, (tensors, index), -(-channels // (BLOCK * LANES))


def scan_forward(u, dt, A, B, C, D, z, dt_bias, index, length, softplus, save):
    """See `ops.backends`."""
    shape, inputs, _alive, blocks = _arguments(u, dt, A, B, C, D, z, dt_bias, index, softplus)
    sequences = u.shape[0] * shape.directions
    y = torch.empty(u.shape[0], shape.directions, length, shape.channels, dtype=torch.float32)
    chunks = -(-shape.steps // CHUNK) if save else 0
    kept = torch.empty(
        u.shape[0], shape.directions, chunks, shape.states, shape.channels, dtype=torch.float32
    )
    run(
        scan_forward_kernel,
        sequences * blocks,
        sequences * blocks * BLOCK * shape.steps * shape.states * _FORWARD_COST,
        forward_scratch(shape.states),
        shape,
        inputs,
        rows(y),
        rows(kept.flatten(2, 3)) if save else NOTHING,
    )
    return y.to(u.dtype), kept


def scan_backward(dy, u, dt, A, B, C, D, z, dt_bias, index, length, softplus, states, dBC=None):
    """See `ops.backends`."""
    if states.shape[2] == 0:  # the forward pass was told not to keep any
        _, states = scan_forward(u, dt, A, B, C, D, z, dt_bias, index, length, softplus, True)
    shape, inputs, _alive, blocks = _arguments(u, dt, A, B, C, D, z, dt_bias, index, softplus)
    batch, dy, sequence = u.shape[0], floats(dy), (shape.directions, shape.channels)
    gradients = [
        torch.empty(u.shape, dtype=torch.float32),
        torch.empty(dt.shape, dtype=torch.float32),
        torch.empty(batch, shape.directions, shape.states, shape.channels, dtype=torch.float32),
        torch.empty(batch * blocks, *B.shape[1:], dtype=torch.float32),
        torch.empty(batch * blocks, *C.shape[1:], dtype=torch.float32),
        None if D is None else torch.zeros(batch, *sequence, dtype=torch.float32),
        None if z is None else torch.empty(z.shape, dtype=torch.float32),
        None if dt_bias is None else torch.zeros(batch, *sequence, dtype=torch.float32),
    ]
    axes = ("bt" if u.dim() == 3 else "bkt", "bkt", "bkt", "bkt", "bkt", "bk", "bt", "bk")
    span = 1 if u.dim() == 4 and z is None else shape.directions
    run(
        scan_backward_kernel,
        batch * shape.directions // span * blocks,
        batch * shape.directions * blocks * BLOCK * shape.steps * shape.states * _BACKWARD_COST,
        backward_scratch(shape.states),
        shape,
        span,
        inputs,
        rows(dy),
        rows(states.flatten(2, 3)),
        Gradients(*(rows(x, names) for x, names in zip(gradients, axes, strict=True))),
    )
    du, ddt, dA, dB, dC, dD, dz, ddt_bias = gradients
    dA = dA.sum(0).transpose(1, 2)
    dB, dC = (x.unflatten(0, (batch, blocks)).sum(1) for x in (dB, dC))
    dB, dC = side_by_side(dB, dC, dBC)
    dD, ddt_bias = (None if x is None else x.sum(0) for x in (dD, ddt_bias))
    inputs = (u, dt, A, B, C, D, z, dt_bias)
    gradients = (du, ddt, dA, dB, dC, dD, dz, ddt_bias)
    return in_dtypes(gradients, inputs)
