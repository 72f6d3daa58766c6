"""Norms of tokens against the float64 reference: with a stream, and alone."""

import torch
from kernel_cases import EPS, Inputs, Layout, Named, assert_close
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


def run_norm(backend: str, tensors: Inputs, dtype: torch.dtype) -> Named:
    """Results and gradients of the residual norm, by name; `dtype` is that of the normed tokens."""
    hidden, residual, *parameters, dnormed, dstream = tensors.values()
    normed, stream = kernels_of("residual_norm", backend).forward(
        hidden, residual, *parameters, EPS, dtype, True
    )
    gradients = kernels_of("residual_norm", backend).backward(
        dnormed, dstream, stream, *parameters, EPS, hidden.dtype, residual is not None
    )
    names = ("dhidden", "dresidual", "dweight", "dbias")
    found = {n: x for n, x in zip(names, gradients, strict=True) if x is not None}
    assert ("dresidual" in found) == (residual is not None)
    return {"normed": normed, "stream": stream, **found}


def run_norm_alone(backend: str, tensors: Inputs, dtype: torch.dtype) -> Named:
    """The same of a norm without a stream, whose gradients are found from its input."""
    hidden, _, *parameters, dnormed, _ = tensors.values()
    normed, stream = kernels_of("residual_norm", backend).forward(
        hidden, None, *parameters, EPS, dtype, False
    )
    assert stream is None
    dhidden, _, dweight, dbias = kernels_of("residual_norm", backend).backward(
        dnormed, None, hidden, *parameters, EPS, hidden.dtype, False
    )
    found = {"normed": normed, "dhidden": dhidden, "dweight": dweight, "dbias": dbias}
    return {name: x for name, x in found.items() if x is not None}


def check_norm_alone(backend: str, tensors: Inputs, dtype: torch.dtype) -> None:
    """Holds the norm without a stream and its gradients against the float64 reference."""
    results = run_norm_alone(backend, tensors, dtype)
    truths = run_norm_alone("reference", in_float64(tensors), torch.float64)
    assert_close(results, truths, dtype)


def check_norm(backend: str, tensors: Inputs, dtype: torch.dtype) -> None:
    """Holds the residual norm and its gradients, by name, against the float64 reference."""
    results = run_norm(backend, tensors, dtype)
    assert (results["normed"].dtype, results["stream"].dtype) == (dtype, torch.float32)
    assert results["dhidden"].dtype == tensors["hidden"].dtype
    assert_close(results, run_norm("reference", in_float64(tensors), torch.float64), dtype)
