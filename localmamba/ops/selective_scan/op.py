"""The selective scan (S6) over all directions of a block: the public function and its custom op.

Paper section 3.2; the recurrence and its gradient are in ops/README.md.
"""

from typing import TYPE_CHECKING, Any, Optional, Protocol

import torch
from torch import Tensor

from .._common.backends import CHUNK, Backends, has_kernels
from .._common.checks import check_index, check_shape
from .._common.registration import (
    Op,
    cast_activations,
    contiguous,
    empty_gradients,
    present_gradients,
    restore,
)
from . import reference


class ScanKernels(Protocol):
    """Kernels of the selective scan; index is int32 [K, P] or None, strides and dtypes any."""

    def scan_forward(
        self,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        index: Tensor | None,
        length: int,
        softplus: bool,
        save: bool,
    ) -> tuple[Tensor, Tensor]:
        """Computes y, [B, K, L, D], and the states of `states_shape`, float32."""

    def scan_backward(
        self,
        dy: Tensor,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        index: Tensor | None,
        length: int,
        softplus: bool,
        states: Tensor,
        dBC: Tensor | None = None,
    ) -> list[Tensor | None]:
        """Computes the gradients of u, dt, A, B, C, D, z and dt_bias, in their dtypes.

        With `dBC`, [B, K, T, 2N], dB and dC are written side by side into it.
        """

    def align_weights(
        self, x_proj: Tensor, dt_weight: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Casts the branches' projections and pads R with zeros to `aligned_rank`."""


if TYPE_CHECKING:
    from . import cpu, cuda

    _CHECKED: tuple[ScanKernels, ...] = (cpu, cuda, reference)

kernels: Backends[ScanKernels] = Backends(__package__)


def states_shape(u: Tensor, A: Tensor, steps: int, save: bool) -> tuple[int, ...]:
    """Returns the shape of the states kept at the start of each chunk, [B, K, chunks, N, D]."""
    chunks = (steps + CHUNK - 1) // CHUNK if save and has_kernels(u) else 0
    return (u.shape[0], A.shape[0], chunks, A.shape[2], A.shape[1])


def _forward(u, dt, A, B, C, D, z, dt_bias, index, length, softplus, save):
    return kernels(u).scan_forward(u, dt, A, B, C, D, z, dt_bias, index, length, softplus, save)


def _fake(u, dt, A, B, C, D, z, dt_bias, index, length, softplus, save):
    steps = u.shape[2] if index is None else index.shape[1]
    y = u.new_empty((u.shape[0], A.shape[0], length, u.shape[-1]))
    return y, u.new_empty(states_shape(u, A, steps, save), dtype=torch.float32)


def _backward(dy, u, *args):
    return contiguous(kernels(u).scan_backward(dy, u, *args))


def _backward_fake(dy, *args):
    return empty_gradients(args[:8])


_TENSORS = (
    "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "Tensor? index, SymInt length, bool softplus"
)
_scan = Op(
    f"selective_scan({_TENSORS}, bool save) -> (Tensor, Tensor)",
    kernel=_forward,
    fake=_fake,
    reference=reference.scan_forward,
)
_scan_backward = Op(
    f"selective_scan_backward(Tensor dy, {_TENSORS}, Tensor states) -> Tensor[]",
    kernel=_backward,
    fake=_backward_fake,
    reference=present_gradients(reference.scan_backward),
    dispatch_on=1,
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, length, softplus, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.length, ctx.softplus = length, softplus
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, dstates: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, index, states = ctx.saved_tensors
    if dy is None:
        return (None,) * 12
    gradients = _scan_backward(dy, *inputs, index, ctx.length, ctx.softplus, states)
    return (*restore(gradients, inputs), None, None, None, None)


_scan.register_autograd(_gradients, _setup_context)
_scan_backward.register_second_derivative()
_scan.register_autocast(cast_activations([0, 1, 3, 4, 6]))


def _flops(u, dt, A, B, C, D, z, dt_bias, index, length, softplus, save):
    steps = u[-2] if index is None else index[1]
    return 2 * u[0] * A[0] * steps * A[1] * (5 * A[2] + 2)


_scan.register_flops(_flops)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor] = None,  # noqa: UP045 - TorchScript reads these
    z: Optional[Tensor] = None,  # noqa: UP045
    dt_bias: Optional[Tensor] = None,  # noqa: UP045
    index: Optional[Tensor] = None,  # noqa: UP045
    length: Optional[int] = None,  # noqa: UP045
    softplus: bool = True,
) -> Tensor:
    """Scans the tokens of each image along K directions (S6, paper section 3.2).

    The inputs stand in grid order (u of shape [B, L, D], shared by the directions; T = L) or in
    scan order (u of shape [B, K, P, D], one sequence a direction; T = P). Any strides, any mix of
    floating dtypes; states and sums are float32 (float64 for a float64 u, on any device through the
    reference).

    Args:
        u: Input, [B, L, D] or [B, K, P, D].
        dt: Step sizes before bias and softplus, [B, K, T, D].
        A: State matrix, negative, [K, D, N], N up to 64.
        B: Input matrix, [B, K, T, N].
        C: Output matrix, [B, K, T, N].
        D: Skip weights, [K, D].
        z: Gate in grid order, [B, L, D]: the output is multiplied by SiLU(z).
        dt_bias: Added to dt before softplus, [K, D].
        index: Scan orders from `scan_index`, int32 [K, P]; without it, u is read as it stands and
            must be in scan order, with L = P.
        length: L, where u is in scan order and padded (P > L).
        softplus: Whether step sizes pass through softplus.

    Returns:
        Output of each direction, in grid order, [B, K, L, D], in the dtype of u.

    Raises:
        ValueError: If shapes do not fit.
    """
    if u.dim() != 3 and u.dim() != 4:
        raise ValueError(f"u must be [B, L, D] or [B, K, P, D], got {u.dim()} axes")
    if u.dim() == 3 and index is None:
        raise ValueError("u of shape [B, L, D] needs an index; without one, give u as [B, K, P, D]")
    if A.dim() != 3 or A.shape[1] != u.shape[-1] or A.shape[2] > 64:
        raise ValueError(
            f"A must be [K, D, N] with D = {u.shape[-1]} and N <= 64, got {list(A.shape)}"
        )
    directions, steps, states = A.shape[0], u.shape[u.dim() - 2], A.shape[2]
    rows = [u.shape[0], directions, steps]
    if u.dim() == 4 and u.shape[1] != directions:
        raise ValueError(f"u has {u.shape[1]} directions, A has {directions}")
    check_shape("dt", dt, rows + [u.shape[-1]])
    if list(B.shape) != rows + [states] or list(C.shape) != rows + [states]:
        raise ValueError(
            f"B and C must be {rows + [states]}, got {list(B.shape)} and {list(C.shape)}"
        )
    check_shape("D", D, [directions, u.shape[-1]])
    check_shape("dt_bias", dt_bias, [directions, u.shape[-1]])
    if index is not None:
        fits = index.dim() == 2 and index.shape[0] == directions
        if not fits or (u.dim() == 4 and index.shape[1] != steps):
            raise ValueError(
                f"index {list(index.shape)} does not fit {directions} directions of {steps} steps"
            )
    tokens = steps if length is None else length
    if tokens != steps and (u.dim() == 3 or index is None):
        raise ValueError(f"length {tokens} does not fit u of {steps} tokens")
    check_shape("z", z, [u.shape[0], tokens, u.shape[-1]])
    if index is not None:
        check_index(index, tokens)
    save = torch.is_grad_enabled()
    return torch.ops.localmamba.selective_scan(
        u, dt, A, B, C, D, z, dt_bias, index, tokens, softplus, save
    )[0]
