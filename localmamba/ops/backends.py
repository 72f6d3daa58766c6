"""Which kernels serve a tensor: a CPU's, a GPU's, or the reference for float64 and other devices.

On a CPU Numba, and oneDNN through PyTorch; on a GPU Triton and CUDA C++. A backend is a module with
the functions below, which know nothing of autograd. The public functions have checked the shapes of
the arguments; strides, floating dtypes and the integer dtype of an index are any, and each backend
makes of them what its kernels read.

    scan_forward(u, dt, A, B, C, D, z, dt_bias, index, length, softplus, save) -> y, states
    scan_backward(dy, u, dt, A, B, C, D, z, dt_bias, index, length, softplus, states, dBC=None)
        -> du, ddt, dA, dB, dC, dD, dz, ddt_bias     (None where the input is None)
    align_weights(x_proj, dt_weight, dtype) -> x_proj, dt_weight
    conv_forward(x, weight, bias, index) -> u
    conv_backward(du, x, weight, bias, index) -> dx, dweight, dbias
    depthwise_forward(x, weight, bias) -> y                              (contiguous)
    depthwise_backward(dy, x, weight, bias) -> dx, dweight, dbias        (None without a bias)
    pool_forward(y, z, eps) -> means
    pool_backward(dmeans, y, z, eps) -> dy, dz
    merge_forward(y, channel_weights, token_weights, z, norm_weight, norm_bias, eps) -> out
    merge_backward(dout, y, channel_weights, token_weights, z, norm_weight, norm_bias, eps)
        -> dy, dchannel_weights, dtoken_weights, dz, dnorm_weight, dnorm_bias
    select_forward(means, *parameters) -> weights, reduced              (of SCAttn's linear layers)
    select_backward(dweights, means, weights, reduced, *parameters) -> dmeans, dparameters
    attend_backward(dout, y, means, weights, reduced, parameters, z, norm_weight, norm_bias,
        gate_first, pool_eps, norm_eps) -> dy, dz, dnorm_weight, dnorm_bias, dparameters
    norm_forward(hidden, residual, weight, bias, cos, sin, scale, eps, dtype, keep_stream)
        -> normed, stream                                               (None unless kept)
    norm_backward(dnormed, dstream, stream, weight, bias, cos, sin, scale, eps, hidden_dtype,
        has_residual) -> dhidden, dresidual, dweight, dbias             (None without the input)

SCAttn's parameters are weight and bias of the pooling's norm, of the first linear layer and of the
second, in the dtype of the means; `reduced` is what the first layer answers. `attend_backward` is
`merge_backward`, `select_backward`, then `pool_backward`, with both gradients of the outputs added.
`scan_backward` writes dB and dC into `dBC`, [B, K, T, 2N], if that is there. `align_weights` brings
the projections of the branches, [K, R + 2N, D] and [K, D, R], to a dtype; with rows and columns of
zeros for R rounded up to `aligned_rank` where the kernels like that better.
Gradients come in the dtype and shape of the inputs.
"""

import importlib
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch

CHUNK = 64
"""Steps between two kept states."""

ALIGN = 8
"""Elements of half precision in the 16 bytes that matrix units and the scan kernels read whole."""

_BACKENDS = {"cpu": ".cpu", "cuda": ".cuda"}


def backend_name(x: torch.Tensor) -> str:
    """The backend module that serves `x`, relative to `localmamba.ops`."""
    if x.dtype == torch.float64:
        return ".reference_backend"
    return _BACKENDS.get(x.device.type, ".reference_backend")


def backend(x: torch.Tensor) -> ModuleType:
    """The kernels that serve `x`, imported at first use."""
    return _imported(backend_name(x))


@cache
def _imported(name: str) -> ModuleType:
    return importlib.import_module(name, __package__)


def states_shape(u: torch.Tensor, A: torch.Tensor, steps: int, save: bool) -> tuple[int, ...]:
    """Shape of the states kept at the start of each chunk: [B, K, chunks, N, D]."""
    keeps = save and backend_name(u) != ".reference_backend"
    chunks = (steps + CHUNK - 1) // CHUNK if keeps else 0
    return (u.shape[0], A.shape[0], chunks, A.shape[2], A.shape[1])


def aligned_rank(rank: int, x: torch.Tensor) -> int:
    """Columns that the factor of dt takes in the kernels that serve x."""
    return round_up(rank) if backend_name(x) == ".cuda" else rank


def round_up(rank: int) -> int:
    """To a multiple of `ALIGN`."""
    return (rank + ALIGN - 1) // ALIGN * ALIGN


def side_by_side(dB: torch.Tensor, dC: torch.Tensor, dBC: torch.Tensor | None):
    """dB and dC, in `dBC` if that is there."""
    if dBC is None:
        return dB, dC
    states = dB.shape[-1]
    return dBC[..., :states].copy_(dB), dBC[..., states:].copy_(dC)


def cast_weights(x_proj: torch.Tensor, dt_weight: torch.Tensor, dtype: torch.dtype):
    """`align_weights` where no alignment is wanted."""
    return x_proj.to(dtype), dt_weight.to(dtype)


def attend_in_parts(
    merge_backward: Callable, select_backward: Callable, pool_backward: Callable
) -> Callable:
    """`attend_backward` for a backend whose `pool_backward` adds its gradient `onto` another."""

    def attend_backward(
        dout, y, means, weights, reduced, parameters, z, norm_weight, norm_bias,
        gate_first, pool_eps, norm_eps,
    ):  # fmt: skip
        dy, dweights, _, dz, dnorm_weight, dnorm_bias = merge_backward(
            dout, y, weights, None, z, norm_weight, norm_bias, norm_eps
        )
        dmeans, dparameters = select_backward(dweights, means, weights, reduced, *parameters)
        dy, dgate = pool_backward(dmeans, y, z if gate_first else None, pool_eps, onto=dy)
        dz = dz if dgate is None else dz.add_(dgate)
        return dy, dz, dnorm_weight, dnorm_bias, dparameters

    return attend_backward
