"""SCAttn and the sum over directions as one op: against its parts, and as an operator."""

import pytest
import torch
import torch.nn.functional as F
from helpers import random, relative_error
from torch import Tensor

from localmamba.ops import combine_directions, pool_directions, scattn_combine

VARIANTS = [(norm, gate_first) for norm in (True, False) for gate_first in (True, False)]
NAMES = (
    "y", "z", "pool_weight", "pool_bias", "reduce_weight", "reduce_bias", "select_weight",
    "select_bias", "norm_weight", "norm_bias",
)  # fmt: skip


def scattn_inputs(norm: bool, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    b, k, length, d, r = 2, 3, 7, 8, 2
    shapes = [(b, k, length, d), (b, length, d), (d,), (d,), (r, d), (r,), (d, r), (d,), (d,), (d,)]
    names = NAMES if norm else NAMES[:8]
    pairs = zip(names, shapes, strict=False)
    return {n: random(*s, seed=i, dtype=dtype) for i, (n, s) in enumerate(pairs)}


def composed(gate_first: bool, **x: Tensor) -> Tensor:
    """The same from the public parts."""
    gate = x["z"] if gate_first else None
    pooled = pool_directions(x["y"], gate, x["pool_weight"], x["pool_bias"])
    reduced = F.gelu(F.linear(pooled, x["reduce_weight"], x["reduce_bias"]))
    weights = torch.sigmoid(F.linear(reduced, x["select_weight"], x["select_bias"]))
    norm = (x.get("norm_weight"), x.get("norm_bias"))
    return combine_directions(x["y"], weights, None, x["z"], *norm)


@pytest.mark.parametrize(("norm", "gate_first"), VARIANTS)
def test_equals_its_parts_with_every_gradient(norm: bool, gate_first: bool) -> None:
    truth = {n: x.requires_grad_() for n, x in scattn_inputs(norm).items()}
    gradient = random(2, 7, 8, seed=20, dtype=torch.float64)
    expected = composed(gate_first, **truth)
    expected_gradients = torch.autograd.grad(expected, list(truth.values()), gradient)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        inputs = {n: x.detach().to(dtype).requires_grad_() for n, x in truth.items()}
        out = scattn_combine(**inputs, gate_first=gate_first)
        assert relative_error(out, expected) < tolerance
        gradients = torch.autograd.grad(out, list(inputs.values()), gradient.to(dtype))
        for name, actual, wanted in zip(inputs, gradients, expected_gradients, strict=True):
            assert relative_error(actual, wanted) < tolerance, name


@pytest.mark.parametrize(("norm", "gate_first"), VARIANTS)
def test_operator_contract(norm: bool, gate_first: bool) -> None:
    tensors = [x.requires_grad_() for x in scattn_inputs(norm, torch.float32).values()]
    tensors += [] if norm else [None, None]
    arguments = (*tensors, gate_first, 1e-5, 1e-5)
    torch.library.opcheck(torch.ops.localmamba.scattn_combine, arguments)


def test_gradcheck() -> None:
    tensors = [x.requires_grad_() for x in scattn_inputs(True).values()]
    assert torch.autograd.gradcheck(scattn_combine, tensors)


@pytest.mark.parametrize(("norm", "gate_first"), VARIANTS)
def test_compiles_whole_and_scripts(norm: bool, gate_first: bool) -> None:
    inputs = scattn_inputs(norm, torch.float32)
    expected = scattn_combine(**inputs, gate_first=gate_first)
    for make in (
        torch.jit.script,
        lambda op: torch.compile(op, fullgraph=True, backend="aot_eager"),
    ):
        assert torch.equal(make(scattn_combine)(**inputs, gate_first=gate_first), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": random(2, 7, 8)}, "y must be [B, K, L, D], got 3 axes"),
        ({"y": random(3, 2, 4, 8)}, "z must be [3, 4, 8], got [2, 7, 8]"),
        ({"z": random(1, 7, 8)}, "z must be [2, 7, 8], got [1, 7, 8]"),
        ({"pool_weight": random(7)}, "pool_weight must be [8], got [7]"),
        ({"pool_bias": random(1, 8)}, "pool_bias must be [8], got [1, 8]"),
        ({"reduce_weight": random(2, 7)}, "reduce_weight must be [D / r, 8], got [2, 7]"),
        ({"reduce_weight": random(8)}, "reduce_weight must be [D / r, 8], got [8]"),
        ({"reduce_bias": random(3)}, "reduce_bias must be [2], got [3]"),
        ({"select_weight": random(2, 8)}, "select_weight must be [8, 2], got [2, 8]"),
        ({"select_bias": random(2)}, "select_bias must be [8], got [2]"),
        ({"norm_weight": random(7)}, "norm_weight must be [8], got [7]"),
        ({"norm_bias": random(9)}, "norm_bias must be [8], got [9]"),
        ({"norm_weight": None}, "norm_bias must be given together, got norm_bias alone"),
        ({"norm_bias": None}, "norm_bias must be given together, got norm_weight alone"),
    ],
)
def test_bad_input_in_one_line(change: dict[str, Tensor | None], message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        scattn_combine(**(scattn_inputs(True, torch.float32) | change))
    assert message in str(error.value)
