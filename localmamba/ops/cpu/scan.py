"""The scan's kernels behind the interface of `ops.backends`."""

import torch

from ..backends import CHUNK
from ..reference_backend import scan_backward as reference_backward
from .rows import floats, int32_index, rows
from .scan_kernels import BLOCK, forward_scratch, scan_forward_kernel
from .threads import run
from .vectors import LANES

_FORWARD_COST = 16
"""Vector operations for each state and step."""


def scan_forward(u, dt, A, B, C, D, z, dt_bias, index, length, softplus, save):
    batch, (directions, channels, states) = u.shape[0], A.shape
    grid_order = u.dim() == 3
    steps = u.shape[-2] if index is None else index.shape[1]
    y = torch.empty(batch, directions, length, channels)
    chunks = (steps + CHUNK - 1) // CHUNK if save else 0
    kept = torch.empty(batch, directions, chunks, states, channels)
    inputs = [floats(x) for x in (u, dt, A, B, C, D, z, dt_bias)]
    axes = ("bt" if grid_order else "bkt", "bkt", "kt", "bkt", "bkt", "k", "bt", "k")
    index, address = int32_index(index)
    tasks = batch * directions * -(-channels // (BLOCK * LANES))
    run(
        scan_forward_kernel,
        tasks,
        tasks * BLOCK * steps * states * _FORWARD_COST,
        forward_scratch(states),
        directions,
        channels,
        steps,
        (states, int(grid_order), int(softplus)),
        *(rows(x, a) for x, a in zip(inputs, axes, strict=True)),
        address,
        rows(y),
        rows(kept.flatten(2, 3) if save else None),
    )
    return y.to(u.dtype), kept


def scan_backward(dy, u, dt, A, B, C, D, z, dt_bias, index, length, softplus, states):
    return reference_backward(dy, u, dt, A, B, C, D, z, dt_bias, index, length, softplus, states)
