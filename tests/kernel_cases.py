"""Kernels against the float64 reference, forward and backward, below autograd and on any device.

The Triton kernels run these cases in Triton's interpreter (tests/ops/interpreted) and, with larger
ones, on a GPU (tests/cuda). Letters: localmamba/ops/README.md.
"""

from collections.abc import Callable
from typing import Any

import torch
from ops.helpers import (
    FORWARD_TOLERANCE,
    GRADIENT_TOLERANCE,
    in_float64,
    random,
    relative_error,
)
from torch import Tensor

from localmamba.ops import reference_backend
from localmamba.ops.scan_orders import index_table

Inputs = dict[str, Tensor | None]
Named = dict[str, Tensor]
Layout = Callable[[Tensor], Tensor]
"""Puts the values of a tensor elsewhere in memory."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5


def expanded(x: Tensor) -> Tensor:
    """One row of x seen everywhere, as the gradient of a mean is."""
    return x[(slice(0, 1),) * (x.dim() - 1)].expand(x.shape)


def conv_arguments(
    directions: tuple[str, ...],
    grid: tuple[int, int],
    channels: int,
    taps: int,
    dtype: torch.dtype,
    device: str = "cpu",
    layout: Layout = torch.clone,
) -> tuple[Tensor, Inputs, tuple[Tensor]]:
    """For 2 images, a gradient of the convolution's output, its tensors by name, and the index."""
    index = torch.from_numpy(index_table(directions, grid).copy())
    du = random(2, *index.shape, channels, seed=4, dtype=dtype)
    tensors = {
        "x": random(2, grid[0] * grid[1], channels, seed=1, dtype=dtype),
        "weight": random(len(directions), channels, taps, seed=2),
        "bias": random(len(directions), channels, seed=3),
    }
    laid_out = {name: layout(x.to(device)) for name, x in tensors.items()}
    return layout(du.to(device)), laid_out, (index.to(device),)


def depthwise_arguments(
    grid: tuple[int, int],
    channels: int,
    size: int,
    dtype: torch.dtype,
    device: str = "cpu",
    layout: Layout = torch.clone,
    bias: bool = True,
    images: int = 2,
) -> tuple[Tensor, Inputs, tuple[()]]:
    """A gradient of the convolution over maps [B, H, W, D], and its tensors by name."""
    gradient = random(images, *grid, channels, seed=4, dtype=dtype)
    tensors = {
        "x": random(images, *grid, channels, seed=1, dtype=dtype),
        "weight": random(channels, 1, size, size, seed=2),
        "bias": random(channels, seed=3) if bias else None,
    }
    laid_out = {name: x if x is None else layout(x.to(device)) for name, x in tensors.items()}
    return layout(gradient.to(device)), laid_out, ()


def pool_arguments(
    tokens: int,
    channels: int,
    gated: bool,
    dtype: torch.dtype,
    device: str = "cpu",
    layout: Layout = torch.clone,
    directions: int = 3,
) -> tuple[Tensor, Inputs, tuple[float]]:
    """For 2 images, a gradient, the pooling's tensors by name, and eps."""
    tensors = {
        "y": random(2, directions, tokens, channels, seed=1, dtype=dtype),
        "z": random(2, tokens, channels, seed=2, dtype=dtype) if gated else None,
    }
    gradient = random(2, directions, channels, seed=5)
    laid_out = {name: x if x is None else layout(x.to(device)) for name, x in tensors.items()}
    return layout(gradient.to(device)), laid_out, (EPS,)


MERGE_OPTIONS = ("channel", "token", "z", "norm")


def merge_arguments(
    tokens: int,
    channels: int,
    options: tuple[str, ...],
    dtype: torch.dtype,
    device: str = "cpu",
    layout: Layout = torch.clone,
    gradient_layout: Layout = expanded,
    directions: int = 3,
) -> tuple[Tensor, Inputs, tuple[float]]:
    """For 2 images, a gradient, the merge's tensors by name, and eps."""
    tensors = {
        "y": random(2, directions, tokens, channels, seed=1, dtype=dtype),
        "channel_weights": random(2, directions, channels, seed=2),
        "token_weights": random(2, directions, tokens, seed=3, dtype=dtype),
        "z": random(2, tokens, channels, seed=4, dtype=dtype),
        "norm_weight": random(channels, seed=5),
        "norm_bias": random(channels, seed=6),
    }
    gradient = random(2, tokens, channels, seed=7, dtype=dtype).to(device)
    on = {name: x if name.startswith(("y", *options)) else None for name, x in tensors.items()}
    laid_out = {name: x if x is None else layout(x.to(device)) for name, x in on.items()}
    return gradient_layout(gradient), laid_out, (EPS,)


def run_kernels(kernels: Any, op: str, gradient: Tensor, tensors: Inputs, rest: tuple) -> Named:
    """Output and gradients, by name, of a pair of kernels `<op>_forward`, `<op>_backward`."""
    forward, backward = (getattr(kernels, f"{op}_{way}") for way in ("forward", "backward"))
    if op == "scan":
        output, states = forward(*tensors.values(), *rest, True)
        gradients = backward(gradient, *tensors.values(), *rest, states)
    else:
        output = forward(*tensors.values(), *rest)
        gradients = backward(gradient, *tensors.values(), *rest)
    pairs = zip(tensors, gradients, strict=True)
    return {"output": output, **{f"d{name}": x for name, x in pairs if x is not None}}


def assert_close(results: Named, truths: Named, dtype: torch.dtype) -> None:
    """Fails with the names of the results that are too far from the truth, or NaN."""
    assert results.keys() == truths.keys()
    far = {}
    for name, x in results.items():
        assert x.shape == truths[name].shape, name
        table = GRADIENT_TOLERANCE if name.startswith("d") else FORWARD_TOLERANCE
        error = relative_error(x, truths[name])
        if not error <= table[dtype]:
            far[name] = f"{error:.1e} > {table[dtype]:.1e}"
    assert not far, far


def check_kernels(
    kernels: Any, op: str, gradient: Tensor, tensors: Inputs, rest: tuple, dtype: torch.dtype
) -> None:
    """Holds an op's output and its gradients, by name, against the float64 reference.

    Args:
        kernels: What has `<op>_forward` and `<op>_backward`, see localmamba/ops/backends.py.
        op: `scan`, `conv`, `depthwise`, `pool` or `merge`.
        gradient: Of the output.
        tensors: The op's differentiable inputs in order; None where an optional one is left out.
        rest: Its other arguments.
        dtype: Whose tolerance holds.
    """
    results = run_kernels(kernels, op, gradient, tensors, rest)
    for name, x in tensors.items():
        found = results.get(f"d{name}")
        assert (found is None) == (x is None), name
        assert x is None or found.dtype == x.dtype, name
    truths = run_kernels(reference_backend, op, gradient.double(), in_float64(tensors), rest)
    assert_close(results, truths, dtype)


SCATTN = (
    "pool_weight", "pool_bias", "reduce_weight", "reduce_bias", "select_weight", "select_bias"
)  # fmt: skip


def select_arguments(
    rows: tuple[int, ...],
    channels: int,
    width: int,
    device: str = "cpu",
    layout: Layout = torch.clone,
) -> tuple[Tensor, Inputs]:
    """A gradient, and the tensors by name, of SCAttn's linear layers; `rows` is (B, K)."""
    shapes = [(channels,), (channels,), (width, channels), (width,), (channels, width), (channels,)]
    scales = (1.0, 1.0, channels**-0.5, 1.0, width**-0.5, 1.0)
    parameters = zip(SCATTN, shapes, scales, strict=True)
    tensors = {"means": random(*rows, channels, seed=1)}
    for seed, (name, shape, scale) in enumerate(parameters, 2):
        tensors[name] = random(*shape, seed=seed) * scale
    laid_out = {name: layout(x.to(device)) for name, x in tensors.items()}
    return layout(random(*rows, channels, seed=9).to(device)), laid_out


def run_select(kernels: Any, gradient: Tensor, tensors: Inputs) -> Named:
    """What SCAttn's linear layers answer, and their gradients, by name."""
    means, *parameters = tensors.values()
    weights, reduced = kernels.select_forward(means, *parameters)
    dmeans, gradients = kernels.select_backward(gradient, means, weights, reduced, *parameters)
    found = zip(tensors, (dmeans, *gradients), strict=True)
    return {"weights": weights, "reduced": reduced, **{f"d{name}": x for name, x in found}}


def check_select(kernels: Any, gradient: Tensor, tensors: Inputs) -> None:
    """Holds them, by name, against the float64 reference."""
    truths = run_select(reference_backend, gradient.double(), in_float64(tensors))
    assert_close(run_select(kernels, gradient, tensors), truths, torch.float32)


def run_attend_backward(
    kernels: Any,
    tokens: int,
    channels: int,
    gate_first: bool,
    norm: bool,
    dtype: torch.dtype,
    device: str = "cpu",
    exact: bool = False,
) -> Named:
    """The gradients of SCAttn and the sum over directions."""
    options = ("channel", "z", "norm") if norm else ("channel", "z")
    gradient, tensors, (eps,) = merge_arguments(tokens, channels, options, dtype, device)
    width = max(channels // 8, 1)
    _, linear = select_arguments((2, 3), channels, width, device)
    linear["reduced"] = random(2, 3, width, seed=10).to(device)
    if exact:
        gradient, tensors, linear = gradient.double(), in_float64(tensors), in_float64(linear)
    y, weights, _, z, norm_weight, norm_bias = tensors.values()
    means, *parameters, reduced = linear.values()
    *found, dparameters = kernels.attend_backward(
        gradient, y, means, weights, reduced, parameters, z, norm_weight, norm_bias,
        gate_first, eps, eps,
    )  # fmt: skip
    names = ("dy", "dz", "dnorm_weight", "dnorm_bias", *(f"d{name}" for name in SCATTN))
    found = zip(names, (*found, *dparameters), strict=True)
    return {name: g for name, g in found if g is not None}


def check_attend(kernels: Any, *arguments) -> None:
    """Holds these gradients, by name, against the float64 reference."""
    results = run_attend_backward(kernels, *arguments)
    truths = run_attend_backward(reference_backend, *arguments, exact=True)
    assert_close(results, truths, arguments[4])
