"""Which kernels serve a tensor: a CPU's, a GPU's, or the reference for float64 and other devices.

On a CPU Numba, and oneDNN through PyTorch; on a GPU Triton and CUDA C++. A backend is a module with
the functions below, which know nothing of autograd. The public functions have checked the shapes of
the arguments; strides, floating dtypes and the integer dtype of an index are any, and each backend
makes of them what its kernels read.

    scan_forward(u, dt, A, B, C, D, z, dt_bias, index, length, softplus, save) -> y, states
    scan_backward(dy, u, dt, A, B, C, D, z, dt_bias, index, length, softplus, states)
        -> du, ddt, dA, dB, dC, dD, dz, ddt_bias     (None where the input is None)
    conv_forward(x, weight, bias, index) -> u
    conv_backward(du, x, weight, bias, index) -> dx, dweight, dbias
    depthwise_forward(x, weight, bias) -> y                              (contiguous)
    depthwise_backward(dy, x, weight, bias) -> dx, dweight, dbias        (None without a bias)
    pool_forward(y, z, eps) -> means
    pool_backward(dmeans, y, z, eps) -> dy, dz
    merge_forward(y, channel_weights, token_weights, z, norm_weight, norm_bias, eps) -> out
    merge_backward(dout, y, channel_weights, token_weights, z, norm_weight, norm_bias, eps)
        -> dy, dchannel_weights, dtoken_weights, dz, dnorm_weight, dnorm_bias
    attend_backward(dout, y, weights, z, norm_weight, norm_bias, gate_first, pool_eps, norm_eps,
        to_means) -> dy, dz, dnorm_weight, dnorm_bias, rest
    norm_forward(hidden, residual, weight, bias, cos, sin, scale, eps, dtype, keep_stream)
        -> normed, stream                                               (None unless kept)
    norm_backward(dnormed, dstream, stream, weight, bias, cos, sin, scale, eps, hidden_dtype,
        has_residual) -> dhidden, dresidual, dweight, dbias             (None without the input)

`attend_backward` is `merge_backward`, then `pool_backward` with their gradients added; `to_means`
leads from the gradient of the channel weights to that of the means, and to what else it finds.
Gradients come in the dtype and shape of the inputs.
"""

import importlib
from collections.abc import Callable
from types import ModuleType

import torch

CHUNK = 64
"""Steps between two kept states."""

_BACKENDS = {"cpu": ".cpu", "cuda": ".cuda"}


def backend_name(x: torch.Tensor) -> str:
    """The backend module that serves `x`, relative to `localmamba.ops`."""
    if x.dtype == torch.float64:
        return ".reference_backend"
    return _BACKENDS.get(x.device.type, ".reference_backend")


def backend(x: torch.Tensor) -> ModuleType:
    """The kernels that serve `x`, imported at first use."""
    return importlib.import_module(backend_name(x), __package__)


def states_shape(u: torch.Tensor, A: torch.Tensor, steps: int, save: bool) -> tuple[int, ...]:
    """Shape of the states kept at the start of each chunk: [B, K, chunks, N, D]."""
    keeps = save and backend_name(u) != ".reference_backend"
    chunks = (steps + CHUNK - 1) // CHUNK if keeps else 0
    return (u.shape[0], A.shape[0], chunks, A.shape[2], A.shape[1])


def attend_in_parts(merge_backward: Callable, pool_backward: Callable) -> Callable:
    """`attend_backward` for a backend whose `pool_backward` adds its gradient `onto` another."""

    def attend_backward(
        dout, y, weights, z, norm_weight, norm_bias, gate_first, pool_eps, norm_eps, to_means
    ):
        dy, dweights, _, dz, dnorm_weight, dnorm_bias = merge_backward(
            dout, y, weights, None, z, norm_weight, norm_bias, norm_eps
        )
        dmeans, rest = to_means(dweights)
        dy, dgate = pool_backward(dmeans, y, z if gate_first else None, pool_eps, onto=dy)
        dz = dz if dgate is None else dz.add_(dgate)
        return dy, dz, dnorm_weight, dnorm_bias, rest

    return attend_backward
