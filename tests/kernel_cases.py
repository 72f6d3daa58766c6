"""Kernels against the float64 reference, forward and backward, below autograd, on any backend.

Letters: localmamba/ops/README.md.
"""

from collections.abc import Callable
from itertools import combinations
from typing import Any, NamedTuple

import pytest
import torch
from ops.backends import Backend
from ops.helpers import (
    FORWARD_TOLERANCE,
    GRADIENT_TOLERANCE,
    LAYOUTS,
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

each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EPS = 1e-5


class Arguments(NamedTuple):
    """Arguments of an op's kernels.

    Attributes:
        gradient: The gradient of the output.
        tensors: Differentiable inputs by name, in order; None where an optional one is left out.
        rest: Other arguments by name.
    """

    gradient: Tensor
    tensors: Inputs
    rest: dict[str, Any]


def subsets(options: tuple[str, ...]) -> list[tuple[str, ...]]:
    """All choices of options, from none to all."""
    return [chosen for n in range(len(options) + 1) for chosen in combinations(options, n)]


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
) -> Arguments:
    """Arguments of the causal convolution of 2 images."""
    index = torch.from_numpy(index_table(directions, grid).copy())
    du = random(2, *index.shape, channels, seed=4, dtype=dtype)
    tensors = {
        "x": random(2, grid[0] * grid[1], channels, seed=1, dtype=dtype),
        "weight": random(len(directions), channels, taps, seed=2),
        "bias": random(len(directions), channels, seed=3),
    }
    laid_out = {name: layout(x.to(device)) for name, x in tensors.items()}
    return Arguments(layout(du.to(device)), laid_out, {"index": index.to(device)})


def depthwise_arguments(
    grid: tuple[int, int],
    channels: int,
    size: int,
    dtype: torch.dtype,
    device: str = "cpu",
    layout: Layout = torch.clone,
    bias: bool = True,
    images: int = 2,
) -> Arguments:
    """Arguments of the depthwise convolution over maps [B, H, W, D]."""
    gradient = random(images, *grid, channels, seed=4, dtype=dtype)
    tensors = {
        "x": random(images, *grid, channels, seed=1, dtype=dtype),
        "weight": random(channels, 1, size, size, seed=2),
        "bias": random(channels, seed=3) if bias else None,
    }
    laid_out = {name: x if x is None else layout(x.to(device)) for name, x in tensors.items()}
    return Arguments(layout(gradient.to(device)), laid_out, {})


def pool_arguments(
    tokens: int,
    channels: int,
    gated: bool,
    dtype: torch.dtype,
    device: str = "cpu",
    layout: Layout = torch.clone,
    directions: int = 3,
) -> Arguments:
    """Arguments of the pooling of 2 images."""
    tensors = {
        "y": random(2, directions, tokens, channels, seed=1, dtype=dtype),
        "z": random(2, tokens, channels, seed=2, dtype=dtype) if gated else None,
    }
    gradient = random(2, directions, channels, seed=5)
    laid_out = {name: x if x is None else layout(x.to(device)) for name, x in tensors.items()}
    return Arguments(layout(gradient.to(device)), laid_out, {"eps": EPS})


COMBINE_OPTIONS = ("channel", "token", "z", "norm")


def combine_arguments(
    tokens: int,
    channels: int,
    options: tuple[str, ...],
    dtype: torch.dtype,
    device: str = "cpu",
    layout: Layout = torch.clone,
    gradient_layout: Layout = expanded,
    directions: int = 3,
) -> Arguments:
    """Arguments of the combination of directions of 2 images."""
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
    return Arguments(gradient_layout(gradient), laid_out, {"eps": EPS})


def run_kernels(op: str, kernels: str, arguments: Arguments) -> Named:
    """Returns the output and the gradients of an op's kernels, by name."""
    host, (gradient, tensors, rest) = kernels_of(op, kernels), arguments
    if op == "selective_scan":
        output, states = host.forward(**tensors, **rest, save=True)
        rest = {**rest, "states": states}
    else:
        output = host.forward(**tensors, **rest)
    gradients = host.backward(gradient, **tensors, **rest)
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
    op: str, backend: Backend, arguments: Arguments, dtype: torch.dtype, kernels: str | None = None
) -> None:
    """Compares an op's output and its gradients, by name, with the float64 reference.

    Args:
        op: A key of `ops.kernels.OPERATORS`.
        backend: Compiles the kernels only, if it does not compute.
        arguments: The kernels' arguments.
        dtype: Chooses the tolerance.
        kernels: Which kernels of the backend, where there are several; see `ops.kernels`.
    """
    results = run_kernels(op, kernels or backend.kernels, arguments)
    gradient, tensors, rest = arguments
    for name, x in tensors.items():
        found = results.get(f"d{name}")
        assert (found is None) == (x is None), name
        assert x is None or found.dtype == x.dtype, name
    if backend.computes:
        exact = Arguments(gradient.double(), in_float64(tensors), rest)
        assert_close(results, run_kernels(op, "reference", exact), dtype)


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


def run_weights(kernels: str, gradient: Tensor, tensors: Inputs) -> Named:
    """Returns SCAttn's channel weights and their gradients, by name."""
    host = kernels_of("scattn_weights", kernels)
    weights, reduced = host.forward(**tensors)
    dmeans, gradients = host.backward(gradient, **tensors, weights=weights, reduced=reduced)
    found = zip(tensors, (dmeans, *gradients), strict=True)
    return {"weights": weights, "reduced": reduced, **{f"d{name}": x for name, x in found}}


def check_weights(backend: Backend, gradient: Tensor, tensors: Inputs) -> None:
    """Compares them, by name, with the float64 reference."""
    results = run_weights(backend.kernels, gradient, tensors)
    if backend.computes:
        truths = run_weights("reference", gradient.double(), in_float64(tensors))
        assert_close(results, truths, torch.float32)


def weights_backward_by_hand(
    dweights: Tensor, means: Tensor, weights: Tensor, reduced: Tensor, parameters: Inputs
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of means and parameters from any weights and reduced, not only those of means.

    Saved tensors that do not follow from each other tell which of them a kernel reads.
    """
    pool_weight, pool_bias, reduce_weight, _, select_weight, _ = parameters.values()
    dlogits = dweights * weights * (1 - weights)
    dreduced = torch.ops.aten.gelu_backward(dlogits @ select_weight, reduced)
    dpooled = dreduced @ reduce_weight
    pooled = torch.addcmul(pool_bias, means, pool_weight)
    return dpooled * pool_weight, [
        (dpooled * means).sum((0, 1)),
        dpooled.sum((0, 1)),
        torch.einsum("bkr,bkd->rd", dreduced, pooled),
        dreduced.sum((0, 1)),
        torch.einsum("bkd,bkr->dr", dlogits, torch.nn.functional.gelu(reduced)),
        dlogits.sum((0, 1)),
    ]


def check_scattn_backward(
    backend: Backend, tokens: int, channels: int, gate_first: bool, norm: bool, dtype: torch.dtype
) -> None:
    """Compares the gradients of SCAttn and the weighted sum with those of its parts in float64."""
    options = ("channel", "z", "norm") if norm else ("channel", "z")
    gradient, tensors, _ = combine_arguments(tokens, channels, options, dtype, backend.device)
    width = max(channels // 8, 1)
    _, linear = weights_arguments((2, 3), channels, width, backend.device)
    means = linear.pop("means")
    reduced = random(2, 3, width, seed=10).to(backend.device)
    weights = tensors["channel_weights"]
    inputs = {
        **{name: tensors[name] for name in ("y", "z")},
        **linear,
        **{name: tensors[name] for name in ("norm_weight", "norm_bias")},
    }
    found = kernels_of("scattn_combine", backend.kernels).backward(
        gradient, **inputs, means=means, weights=weights, reduced=reduced,
        gate_first=gate_first, pool_eps=EPS, norm_eps=EPS,
    )  # fmt: skip
    results = {f"d{n}": x for n, x in zip(inputs, found, strict=True) if x is not None}
    if not backend.computes:
        return
    gradient, means, weights, reduced = (x.double() for x in (gradient, means, weights, reduced))
    exact, parameters = in_float64(tensors), in_float64(linear)
    dy, dweights, _, dz, *dnorm = kernels_of("combine_directions", "reference").backward(
        gradient, **exact, eps=EPS
    )
    dmeans, dparameters = weights_backward_by_hand(dweights, means, weights, reduced, parameters)
    gate = exact["z"] if gate_first else None
    dy_pool, dz_pool = kernels_of("pool_directions", "reference").backward(
        dmeans, y=exact["y"], z=gate, eps=EPS
    )
    dz = dz if dz_pool is None else dz + dz_pool
    truths = zip(inputs, (dy + dy_pool, dz, *dparameters, *dnorm), strict=True)
    assert_close(results, {f"d{name}": x for name, x in truths if x is not None}, dtype)
