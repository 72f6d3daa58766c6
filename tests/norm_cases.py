"""Norms of tokens against the float64 reference: with a stream, and alone."""

import torch
from kernel_cases import EPS, Inputs, Layout, Named, assert_close
from ops.backends import Backend
from ops.helpers import in_float64, random
from ops.kernels import kernels_of

NORM_OPTIONS = ("residual", "bias", "rotary", "scale", "stream")


def norm_arguments(
    shape: tuple[int, ...],
    options: tuple[str, ...],
    dtype: torch.dtype,
    device: str = "cpu",
    layout: Layout = torch.clone,
) -> Inputs:
    """The residual norm's tensors by name, with gradients of its results; shape [..., L, C]."""
    tokens, channels = shape[-2:]
    angles = random(1, tokens, channels // 2, seed=5).repeat_interleave(2, dim=-1)
    tensors = {
        "hidden": random(*shape, seed=1, dtype=dtype),
        "residual": random(*shape, seed=2) if "residual" in options else None,
        "weight": random(channels, seed=3),
        "bias": random(channels, seed=4) if "bias" in options else None,
        "cos": angles.cos() if "rotary" in options else None,
        "sin": angles.sin() if "rotary" in options else None,
        "scale": random(shape[0], seed=8) if "scale" in options else None,
        "dnormed": random(*shape, seed=6, dtype=dtype),
        "dstream": random(*shape, seed=7) if "stream" in options else None,
    }
    return {name: x if x is None else layout(x.to(device)) for name, x in tensors.items()}


def run_norm(kernels: str, tensors: Inputs, dtype: torch.dtype, alone: bool = False) -> Named:
    """Returns results and gradients of the residual norm, by name.

    Args:
        kernels: A backend of `ops.kernels.kernels_of`.
        tensors: From `norm_arguments`.
        dtype: The dtype of the normalized tokens.
        alone: Whether the norm has no stream; its gradients are found from its input.
    """
    host = kernels_of("residual_norm", kernels)
    names = ("weight", "bias", "cos", "sin", "scale")
    shared = {**{name: tensors[name] for name in names}, "eps": EPS}
    hidden, residual = tensors["hidden"], None if alone else tensors["residual"]
    normed, stream = host.forward(
        hidden=hidden, residual=residual, **shared, dtype=dtype, keep_stream=not alone
    )
    assert (stream is None) == alone
    gradients = host.backward(
        tensors["dnormed"],
        dstream=None if alone else tensors["dstream"],
        stream=hidden if alone else stream,
        **shared,
        hidden_dtype=hidden.dtype,
        has_residual=residual is not None,
    )
    found = zip(("dhidden", "dresidual", "dweight", "dbias"), gradients, strict=True)
    results = {"normed": normed, "stream": stream, **dict(found)}
    assert (results["dresidual"] is None) == (residual is None)
    return {name: x for name, x in results.items() if x is not None}


def check_norm(backend: Backend, tensors: Inputs, dtype: torch.dtype, alone: bool = False) -> None:
    """Compares the norm and its gradients, by name, with the float64 reference."""
    results = run_norm(backend.kernels, tensors, dtype, alone)
    assert results["normed"].dtype == dtype
    assert alone or results["stream"].dtype == torch.float32
    assert results["dhidden"].dtype == tensors["hidden"].dtype
    if backend.computes:
        truths = run_norm("reference", in_float64(tensors), torch.float64, alone)
        assert_close(results, truths, dtype)
