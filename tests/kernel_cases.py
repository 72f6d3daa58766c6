"""Kernels against the float64 reference, forward and backward, below autograd and on any device.

The Triton kernels run these cases in Triton's interpreter (tests/ops/interpreted) and, with larger
ones, on a GPU (tests/cuda). Letters: localmamba/ops/README.md.
"""

from collections.abc import Callable

import torch
from ops.helpers import (
    FORWARD_TOLERANCE,
    GRADIENT_TOLERANCE,
    in_float64,
    random,
    relative_error,
)
from ops.kernels import kernels_of
from torch import Tensor

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


def run_kernels(op: str, backend: str, gradient: Tensor, tensors: Inputs, rest: tuple) -> Named:
    """Returns the output and the gradients of an op's kernels, by name."""
    kernels = kernels_of(op, backend)
    if op == "selective_scan":
        output, states = kernels.forward(*tensors.values(), *rest, True)
        gradients = kernels.backward(gradient, *tensors.values(), *rest, states)
    else:
        output = kernels.forward(*tensors.values(), *rest)
        gradients = kernels.backward(gradient, *tensors.values(), *rest)
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
    op: str, backend: str, gradient: Tensor, tensors: Inputs, rest: tuple, dtype: torch.dtype
) -> None:
    """Compares an op's output and its gradients, by name, with the float64 reference.

    Args:
        op: A key of `ops.kernels.OPERATORS`.
        backend: See `ops.kernels.kernels_of`.
        gradient: The gradient of the output.
        tensors: The op's differentiable inputs in order; None where an optional one is left out.
        rest: Its other arguments.
        dtype: Chooses the tolerance.
    """
    results = run_kernels(op, backend, gradient, tensors, rest)
    for name, x in tensors.items():
        found = results.get(f"d{name}")
        assert (found is None) == (x is None), name
        assert x is None or found.dtype == x.dtype, name
    truths = run_kernels(op, "reference", gradient.double(), in_float64(tensors), rest)
    assert_close(results, truths, dtype)


SCATTN = (
    "pool_weight", "pool_bias", "reduce_weight", "reduce_bias", "select_weight", "select_bias"
)  # fmt: skip


def weights_arguments(
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


def run_weights(backend: str, gradient: Tensor, tensors: Inputs) -> Named:
    """Returns SCAttn's channel weights and their gradients, by name."""
    kernels = kernels_of("scattn_weights", backend)
    means, *parameters = tensors.values()
    weights, reduced = kernels.forward(means, *parameters)
    dmeans, gradients = kernels.backward(gradient, means, weights, reduced, *parameters)
    found = zip(tensors, (dmeans, *gradients), strict=True)
    return {"weights": weights, "reduced": reduced, **{f"d{name}": x for name, x in found}}


def check_weights(backend: str, gradient: Tensor, tensors: Inputs) -> None:
    """Compares them, by name, with the float64 reference."""
    truths = run_weights("reference", gradient.double(), in_float64(tensors))
    assert_close(run_weights(backend, gradient, tensors), truths, torch.float32)


def run_scattn_backward(
    backend: str,
    tokens: int,
    channels: int,
    gate_first: bool,
    norm: bool,
    dtype: torch.dtype,
    device: str = "cpu",
    exact: bool = False,
) -> Named:
    """Returns the gradients of SCAttn and the weighted sum over directions, by name."""
    options = ("z", "norm") if norm else ("z",)
    gradient, tensors, (eps,) = merge_arguments(tokens, channels, options, dtype, device)
    _, linear = weights_arguments((2, 3), channels, max(channels // 8, 1), device)
    inputs = {name: tensors[name] for name in ("y", "z")}
    inputs |= {name: linear[name] for name in SCATTN}
    inputs |= {name: tensors[name] for name in ("norm_weight", "norm_bias")}
    truth = in_float64(inputs)
    means = kernels_of("pool_directions", "reference").forward(
        truth["y"], truth["z"] if gate_first else None, eps
    )
    forward = kernels_of("scattn_weights", "reference").forward
    weights, reduced = forward(means, *(truth[name] for name in SCATTN))
    saved = (means, weights, reduced)
    if exact:
        gradient, inputs = gradient.double(), truth
    else:
        saved = tuple(x.float() for x in saved)
    found = kernels_of("scattn_combine", backend).backward(
        gradient, *saved, *inputs.values(), gate_first, eps, eps
    )
    pairs = zip(inputs, found, strict=True)
    return {f"d{name}": g for name, g in pairs if g is not None}


def check_scattn_backward(backend: str, *arguments) -> None:
    """Compares these gradients, by name, with the float64 reference."""
    results = run_scattn_backward(backend, *arguments)
    truths = run_scattn_backward("reference", *arguments, exact=True)
    assert_close(results, truths, arguments[4])
