"""SCAttn and the sum over directions as one op: against its parts, and as an operator."""

import pytest
import torch
import torch.nn.functional as F
from helpers import random, relative_error
from torch import Tensor

from localmamba.ops import attend_branches, merge_branches, pool_branches

VARIANTS = [(norm, gate_first) for norm in (True, False) for gate_first in (True, False)]
NAMES = (
    "y", "z", "pool_weight", "pool_bias", "reduce_weight", "reduce_bias", "select_weight",
    "select_bias", "norm_weight", "norm_bias",
)  # fmt: skip


def attend_inputs(norm: bool, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    b, k, length, d, r = 2, 3, 7, 8, 2
    shapes = [(b, k, length, d), (b, length, d), (d,), (d,), (r, d), (r,), (d, r), (d,), (d,), (d,)]
    names = NAMES if norm else NAMES[:8]
    pairs = zip(names, shapes, strict=False)
    return {n: random(*s, seed=i, dtype=dtype) for i, (n, s) in enumerate(pairs)}


def composed(gate_first: bool, **x: Tensor) -> Tensor:
    """The same from the public parts."""
    gate = x["z"] if gate_first else None
    pooled = pool_branches(x["y"], gate, x["pool_weight"], x["pool_bias"])
    reduced = F.gelu(F.linear(pooled, x["reduce_weight"], x["reduce_bias"]))
    weights = torch.sigmoid(F.linear(reduced, x["select_weight"], x["select_bias"]))
    norm = (x.get("norm_weight"), x.get("norm_bias"))
    return merge_branches(x["y"], weights, None, x["z"], *norm)


@pytest.mark.parametrize(("norm", "gate_first"), VARIANTS)
def test_equals_its_parts_with_every_gradient(norm: bool, gate_first: bool) -> None:
    truth = {n: x.requires_grad_() for n, x in attend_inputs(norm).items()}
    gradient = random(2, 7, 8, seed=20, dtype=torch.float64)
    expected = composed(gate_first, **truth)
    expected_gradients = torch.autograd.grad(expected, list(truth.values()), gradient)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        inputs = {n: x.detach().to(dtype).requires_grad_() for n, x in truth.items()}
        out = attend_branches(**inputs, gate_first=gate_first)
        assert relative_error(out, expected) < tolerance
        gradients = torch.autograd.grad(out, list(inputs.values()), gradient.to(dtype))
        for name, actual, wanted in zip(inputs, gradients, expected_gradients, strict=True):
            assert relative_error(actual, wanted) < tolerance, name


@pytest.mark.parametrize(("norm", "gate_first"), VARIANTS)
def test_operator_contract(norm: bool, gate_first: bool) -> None:
    tensors = [x.requires_grad_() for x in attend_inputs(norm, torch.float32).values()]
    tensors += [] if norm else [None, None]
    arguments = (*tensors, gate_first, 1e-5, 1e-5)
    torch.library.opcheck(torch.ops.localmamba.attend_branches, arguments)


def test_gradcheck() -> None:
    tensors = [x.requires_grad_() for x in attend_inputs(True).values()]
    assert torch.autograd.gradcheck(attend_branches, tensors)
