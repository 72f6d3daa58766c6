"""The selective scan (S6) over all directions of a block: the public function and its custom op.

Paper section 3.2; the recurrence and its gradient are in ops/README.md.
"""

from typing import TYPE_CHECKING, Any, Optional, Protocol

import torch
from torch import Size, Tensor

from .._common.backends import CHUNK, Backends, has_kernels
from .._common.checks import check_index, check_shape
from .._common.registration import Op, cast_activations
from . import reference
from .reference import ScanInputs


class ScanKernels(Protocol):
    """Kernels of the selective scan and of the S6 branches, for any strides and dtypes."""

    def scan_forward(self, inputs: ScanInputs, save: bool) -> tuple[Tensor, Tensor]:
        """Computes y, [B, K, L, D], and the states of `states_shape`, float32."""

    def scan_backward(
        self, dy: Tensor, inputs: ScanInputs, states: Tensor, dBC: Tensor | None = None
    ) -> list[Tensor | None]:
        """Computes the gradients of `inputs.tensors`, in their dtypes.

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
    """Returns the shape of the states at the start of each chunk: [B, K, chunks * N * D].

    With an axis of its own, the number of chunks would be compared with 1 in `torch.export`, and a
    program exported from a small grid would refuse a larger one.
    """
    chunks = (steps + CHUNK - 1) // CHUNK if save and has_kernels(u) else 0
    return (u.shape[0], A.shape[0], chunks * A.shape[2] * A.shape[1])


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    return kernels(args[0]).scan_forward(ScanInputs(*args[:-1]), args[-1])


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    inputs, save = ScanInputs(*args[:-1]), args[-1]
    u, A = inputs.u, inputs.A
    y = u.new_empty((u.shape[0], A.shape[0], inputs.length, u.shape[-1]))
    return y, u.new_empty(states_shape(u, A, inputs.steps, save), dtype=torch.float32)


def _reference(*args: Any) -> tuple[Tensor, Tensor]:
    return reference.scan_forward(ScanInputs(*args[:-1]), args[-1])


def _backward(dy: Tensor, states: Tensor, *args: Any) -> list[Tensor | None]:
    return kernels(args[0]).scan_backward(dy, ScanInputs(*args[:-1]), states)


def _backward_reference(dy: Tensor, states: Tensor, *args: Any) -> list[Tensor | None]:
    return reference.scan_backward(dy, ScanInputs(*args[:-1]), states)


_scan = Op(
    "selective_scan(Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? dt_bias, Tensor? index, SymInt length, bool softplus, bool save) -> (Tensor, Tensor)",
    kernel=_forward,
    fake=_fake,
    reference=_reference,
)
_scan.register_backward(_backward, _backward_reference, tensors=8)


def scan_multiply_adds(
    steps: int, channels: int, states: int, per_state: int = 5, per_channel: int = 2
) -> int:
    """Counts the operations of one sequence, each as a multiply-add.

    Args:
        steps: P.
        channels: D.
        states: N.
        per_state: Operations per state and step: delta A, its exponential, delta u times B, the new
            state, its part of C h.
        per_channel: Operations per channel and step: delta u and D u.
    """
    return steps * channels * (per_state * states + per_channel)


def _flops(
    u: Size, dt: Size, A: Size, B: Size, C: Size, D: Any, z: Any, dt_bias: Any, index: Size | None,
    *_: Any,
) -> int:  # fmt: skip
    """Counts FLOPs, two a multiply-add, for `torch.utils.flop_counter`."""
    steps = u[-2] if index is None else index[1]
    return 2 * u[0] * A[0] * scan_multiply_adds(steps, A[1], A[2])


_scan.register_autocast(cast_activations([0, 1, 3, 4, 6]))
_scan.register_flops(_flops)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor] = None,
    z: Optional[Tensor] = None,
    dt_bias: Optional[Tensor] = None,
    index: Optional[Tensor] = None,
    length: Optional[int] = None,
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
