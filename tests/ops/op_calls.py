"""One call of every public op, and of its variants, with the FLOPs that it takes."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from ops.helpers import random
from torch import Tensor

from localmamba import ops

B, H, W, D, N, TAPS, R = 2, 2, 3, 4, 3, 4, 2
L = H * W
DIRECTIONS = ["h", "v_flip", "w2"]
K, P = len(DIRECTIONS), 8
"""Windows of 2 x 2 pad the 6 tokens to 8 steps."""


@dataclass(frozen=True)
class Call:
    """A public op with arguments.

    Attributes:
        name: The op, and the variant after a comma.
        op: Takes the tensors; other arguments are bound.
        tensors: Inputs with a gradient, float32.
        flops: Twice the multiply-adds of the call.
        autocast: Whether the result takes autocast's dtype.
    """

    name: str
    op: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    flops: int
    autocast: bool

    def __call__(self, *tensors: Tensor) -> Tensor:
        return self.op(*tensors)

    def __str__(self) -> str:
        return self.name

    @property
    def exact(self) -> tuple[Tensor, ...]:
        """The tensors in float64."""
        return tuple(x.double() for x in self.tensors)

    def loss(self, *tensors: Tensor) -> Tensor:
        """A sum of squares of the result."""
        return self.op(*tensors).square().sum()


def op_calls(device: str = "cpu") -> list[Call]:
    """Returns the columns of the matrix of modes (test_modes.py)."""

    def tensors(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
        return tuple(random(*shape, seed=i).to(device) for i, shape in enumerate(shapes))

    index = ops.scan_index(torch.empty(0, device=device), DIRECTIONS, H, W)
    angles = random(1, L, D // 2, seed=20).repeat_interleave(2, dim=-1).to(device)
    rotary = {"cos": angles.cos(), "sin": angles.sin(), "scale": torch.ones(B, device=device)}

    def scan(u, dt, A, B, C, D=None, z=None, dt_bias=None):
        return ops.selective_scan(u, dt - 1, -A.abs(), B, C, D, z, dt_bias, index, L)

    def branches(x, x_proj, dt_weight, dt_bias, A, D, *conv):
        return ops.s6_branches(x, x_proj / 4, dt_weight, dt_bias - 1, -A.abs(), D, index, *conv)

    def residual_norm(hidden, residual, *parameters):
        return torch.cat(ops.residual_norm(hidden, residual, *parameters, **rotary))

    def rms_norm(hidden, weight):
        return torch.cat(ops.residual_norm(hidden, None, weight))

    def scattn(y, z, *parameters):
        return ops.scattn_combine(y, z, *parameters, gate_first=len(parameters) == 8)

    y, x = (B, K, L, D), (B, L, D)
    scattn_shapes = (y, x, (D,), (D,), (R, D), (R,), (D, R), (D,))
    branch_shapes = (x, (K, R + 2 * N, D), (K, D, R), (K, D), (K, D, N), (K, D))
    conv_shapes = ((K, D, TAPS), (K, D))
    scanned = 2 * B * K * P * D * (5 * N + 2)
    convolved = 2 * B * K * P * D * TAPS
    dense = 2 * B * K * D * (2 * R + 2 * N)
    attention = 2 * B * K * 2 * R * D
    depthwise = 2 * B * L * D * 9
    grid = (B, H, W, D)
    calls = [
        Call(
            "selective_scan", scan,
            tensors(
                x, (B, K, L, D), (K, D, N), (B, K, L, N), (B, K, L, N), (K, D), x, (K, D)
            ), scanned, True,
        ),
        Call(
            "selective_scan, scan order", scan,
            tensors((B, K, P, D), (B, K, P, D), (K, D, N), (B, K, P, N), (B, K, P, N)),
            scanned, True,
        ),
        Call("s6_branches", branches, tensors(*branch_shapes, *conv_shapes),
             scanned + convolved + P * dense, True),
        Call("s6_branches, plain", branches, tensors(*branch_shapes), scanned + L * dense, True),
        Call("causal_conv", lambda *x: ops.causal_conv(*x, index), tensors(x, *conv_shapes),
             convolved, True),
        Call("depthwise_conv", ops.depthwise_conv, tensors(grid, (D, 1, 3, 3), (D,)), depthwise,
             True),
        Call("depthwise_conv, no bias", ops.depthwise_conv, tensors(grid, (D, 1, 3, 3)), depthwise,
             True),
        Call("pool_directions", ops.pool_directions, tensors(y, x, (D,), (D,)), 0, False),
        Call("pool_directions, no gate", lambda y, *p: ops.pool_directions(y, None, *p),
             tensors(y, (D,), (D,)), 0, False),
        Call("combine_directions", ops.combine_directions,
             tensors(y, (B, K, D), (B, K, L), x, (D,), (D,)), 0, False),
        Call("combine_directions, sum alone", ops.combine_directions, tensors(y), 0, False),
        Call("scattn_combine", scattn, tensors(*scattn_shapes, (D,), (D,)), attention, False),
        Call("scattn_combine, no norm", scattn, tensors(*scattn_shapes), attention, False),
        Call("residual_norm", residual_norm, tensors(x, x, (D,), (D,)), 0, False),
        Call("residual_norm, rms", rms_norm, tensors(x, (D,)), 0, False),
        Call("token_norm", ops.token_norm, tensors(x, (D,), (D,)), 0, True),
        Call("token_norm, rms", ops.token_norm, tensors(x, (D,)), 0, True),
    ]  # fmt: skip
    return [replace(call, tensors=tuple(x.detach() for x in call.tensors)) for call in calls]
