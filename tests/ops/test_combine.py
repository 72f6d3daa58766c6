"""Pooling and combination of directions: against layers of PyTorch, and on hostile input."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import LAYOUTS, assert_matches_reference, random, relative_error
from torch import Tensor

from localmamba.ops import combine_directions, pool_directions
from localmamba.ops.combine.reference import combine_directions_reference, pool_directions_reference

SHAPES = [(4, 3, 1, 5), (2, 3, 17, 16), (2, 4, 50, 20), (1, 2, 1100, 33)]
"""B, K, L, D"""


def pool_inputs(
    shape: tuple[int, ...], gated: bool = True, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor | None]:
    batch, _, length, channels = shape
    return {
        "y": random(*shape, seed=1, dtype=dtype) + 1,
        "z": random(batch, length, channels, seed=2, dtype=dtype) if gated else None,
        "weight": random(channels, seed=3),
        "bias": random(channels, seed=4),
        "eps": 1e-5,
    }


def combine_inputs(
    shape: tuple[int, ...], present: str = "channel token gate norm", dtype=torch.float32
) -> dict[str, Tensor | None]:
    batch, directions, length, channels = shape
    inputs = {
        "channel_weights": ("channel", random(batch, directions, channels, seed=2).sigmoid()),
        "token_weights": ("token", random(batch, directions, length, seed=3).sigmoid()),
        "z": ("gate", random(batch, length, channels, seed=4, dtype=dtype)),
        "norm_weight": ("norm", random(channels, seed=5)),
        "norm_bias": ("norm", random(channels, seed=6)),
    }
    given = {name: x if key in present else None for name, (key, x) in inputs.items()}
    return {"y": random(*shape, seed=1, dtype=dtype) + 1, **given, "eps": 1e-5}


COMBINATIONS = [
    " ".join(itertools.compress(("channel", "token", "gate", "norm"), chosen)) or "sum alone"
    for chosen in itertools.product((0, 1), repeat=4)
]


def test_pooling_is_a_norm_and_a_mean() -> None:
    inputs = pool_inputs((2, 3, 7, 5), dtype=torch.float64)
    norm = torch.nn.LayerNorm(5, dtype=torch.float64)
    norm.weight.data, norm.bias.data = inputs["weight"].double(), inputs["bias"].double()
    gated = torch.stack([y * F.silu(inputs["z"]) for y in inputs["y"].unbind(1)], dim=1)
    expected = torch.stack([norm(y).mean(1) for y in gated.unbind(1)], dim=1)
    assert relative_error(pool_directions_reference(**inputs), expected) < 1e-13


def test_combination_is_a_weighted_sum() -> None:
    inputs = combine_inputs((2, 3, 7, 5), dtype=torch.float64)
    norm = torch.nn.LayerNorm(5, dtype=torch.float64)
    norm.weight.data = inputs["norm_weight"].double()
    norm.bias.data = inputs["norm_bias"].double()
    total = torch.einsum(
        "bkld,bkd,bkl->bld",
        inputs["y"],
        inputs["channel_weights"].double(),
        inputs["token_weights"].double(),
    )
    expected = norm(total) * F.silu(inputs["z"])
    assert relative_error(combine_directions_reference(**inputs), expected) < 1e-13


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pooling_matches_reference(shape: tuple[int, ...], gated: bool) -> None:
    inputs = pool_inputs(shape, gated)
    assert_matches_reference(pool_directions, pool_directions_reference, inputs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("present", COMBINATIONS)
def test_combination_matches_reference(present: str, shape: tuple[int, ...]) -> None:
    inputs = combine_inputs(shape, present)
    assert_matches_reference(combine_directions, combine_directions_reference, inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(layout: str) -> None:
    change = LAYOUTS[layout]
    for op, reference, inputs in (
        (pool_directions, pool_directions_reference, pool_inputs(SHAPES[2])),
        (combine_directions, combine_directions_reference, combine_inputs(SHAPES[2])),
    ):
        hostile = {k: change(x) if isinstance(x, Tensor) else x for k, x in inputs.items()}
        assert_matches_reference(op, reference, hostile)


def test_expanded_inputs_and_gradients() -> None:
    inputs = combine_inputs(SHAPES[2])
    inputs["y"] = inputs["y"][:, :1].expand(SHAPES[2])
    dy = torch.tensor(0.5).double()
    assert_matches_reference(combine_directions, combine_directions_reference, inputs, dy=dy)


def test_a_mean_far_from_zero() -> None:
    """The variance is of what is left without the mean: no digits are lost twice."""
    inputs = pool_inputs((1, 2, 9, 20), gated=False)
    inputs["y"] = inputs["y"] + 1000
    actual, expected = pool_directions(**inputs), pool_directions_reference(**inputs)
    truth = pool_directions_reference(**inputs | {"y": inputs["y"].double()})
    assert relative_error(actual, truth) < 2 * relative_error(expected, truth) + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    pooled = pool_directions(**pool_inputs(SHAPES[2], dtype=dtype))
    assert pooled.dtype == torch.float32, "SCAttn's small layers follow autocast, not this"
    combined = combine_inputs(SHAPES[2], dtype=dtype)
    assert_matches_reference(combine_directions, combine_directions_reference, combined, dtype)


@pytest.mark.usefixtures("poisoned_memory")
def test_writes_every_cell() -> None:
    for present in ("sum alone", "channel token gate norm"):
        inputs = combine_inputs((2, 3, 50, 21), present)
        assert_matches_reference(combine_directions, combine_directions_reference, inputs)
    for gated in (True, False):
        inputs = pool_inputs((2, 3, 50, 21), gated)
        assert_matches_reference(pool_directions, pool_directions_reference, inputs)


def test_empty_batch() -> None:
    pooling, combination = pool_inputs((0, 2, 3, 4)), combine_inputs((0, 2, 3, 4))
    weight, norm_weight = pooling["weight"], combination["norm_weight"]
    pooled = pool_directions(**pooling | {"weight": weight.requires_grad_()})
    combined = combine_directions(**combination | {"norm_weight": norm_weight.requires_grad_()})
    (pooled.sum() + combined.sum()).backward()
    assert pooled.shape == (0, 2, 4)
    assert combined.shape == (0, 3, 4)
    assert not weight.grad.any()
    assert not norm_weight.grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": random(2, 17, 16)}, "y must be [B, K, L, D], got 3 axes"),
        ({"z": random(17, 16)}, "z must be [2, 17, 16], got [17, 16]"),
        ({"z": random(1, 17, 16)}, "z must be [2, 17, 16], got [1, 17, 16]"),
        ({"weight": random(15)}, "weight must be [16], got [15]"),
        ({"weight": torch.tensor(1.0)}, "weight must be [16], got []"),
        ({"bias": random(1, 16)}, "bias must be [16], got [1, 16]"),
    ],
)
def test_bad_pooling_input_in_one_line(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        pool_directions(**(pool_inputs((2, 3, 17, 16)) | change))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": random(2, 17, 16)}, "y must be [B, K, L, D], got 3 axes"),
        ({"channel_weights": random(2, 3, 17)}, "channel_weights must be [2, 3, 16], got [2, 3,"),
        ({"channel_weights": random(3, 16)}, "channel_weights must be [2, 3, 16], got [3, 16]"),
        ({"token_weights": random(2, 3, 16)}, "token_weights must be [2, 3, 17], got [2, 3, 16]"),
        ({"token_weights": random(2, 1, 17)}, "token_weights must be [2, 3, 17], got [2, 1, 17]"),
        ({"z": random(1, 17, 16)}, "z must be [2, 17, 16], got [1, 17, 16]"),
        ({"norm_weight": random(15)}, "norm_weight must be [16], got [15]"),
        ({"norm_bias": random(17)}, "norm_bias must be [16], got [17]"),
        ({"norm_weight": None}, "norm_bias must be given together, got norm_bias alone"),
        ({"norm_bias": None}, "norm_bias must be given together, got norm_weight alone"),
    ],
)
def test_bad_combination_input_in_one_line(change: dict[str, Tensor | None], message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        combine_directions(**(combine_inputs((2, 3, 17, 16)) | change))
    assert message in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_operator_contract(dtype: torch.dtype) -> None:
    def arguments(inputs: dict) -> tuple:
        return tuple(x.requires_grad_() if isinstance(x, Tensor) else x for x in inputs.values())

    shape = (2, 2, 3, 4)
    for gated in (True, False):
        inputs = {k: pool_inputs(shape, gated, dtype)[k] for k in ("y", "z", "eps")}
        torch.library.opcheck(torch.ops.localmamba.pool_directions, arguments(inputs))
    for present in ("channel norm gate", "token"):
        inputs = combine_inputs(shape, present, dtype)
        torch.library.opcheck(torch.ops.localmamba.combine_directions, arguments(inputs))


def test_gradients_in_float64() -> None:
    for op, inputs in (
        (pool_directions, pool_inputs((1, 2, 3, 4), dtype=torch.float64)),
        (combine_directions, combine_inputs((1, 2, 3, 4), dtype=torch.float64)),
    ):
        tensors = [x.double().requires_grad_() for x in inputs.values() if isinstance(x, Tensor)]
        assert torch.autograd.gradcheck(op, tensors)


def test_compiles_whole() -> None:
    for op, reference, inputs in (
        (pool_directions, pool_directions_reference, pool_inputs(SHAPES[1])),
        (combine_directions, combine_directions_reference, combine_inputs(SHAPES[1])),
    ):
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
        assert_matches_reference(compiled, reference, inputs)


def test_scripts() -> None:
    for op, inputs in (
        (pool_directions, pool_inputs(SHAPES[1])),
        (combine_directions, combine_inputs(SHAPES[1])),
    ):
        assert torch.equal(torch.jit.script(op)(**inputs), op(**inputs))
