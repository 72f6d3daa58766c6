"""The step of the residual stream: against layers of PyTorch, and on hostile input."""

import itertools

import pytest
import torch
from helpers import LAYOUTS, assert_matches_reference, in_float64, random, relative_error
from torch import Tensor

from localmamba.ops import residual_norm, token_norm
from localmamba.ops.residual_norm.reference import residual_norm_reference

COMBINATIONS = [
    " ".join(itertools.compress(("residual", "rotary", "centered", "scale"), chosen))
    or "norm alone"
    for chosen in itertools.product((0, 1), repeat=4)
]


def norm_inputs(
    present: str = "residual rotary centered scale",
    shape: tuple[int, ...] = (2, 21, 20),
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor | None]:
    *_, length, channels = shape
    angles = random(1, length, channels // 2, seed=5).repeat_interleave(2, dim=-1)
    return {
        "hidden": random(*shape, seed=1, dtype=dtype) + 1,
        "residual": random(*shape, seed=2) if "residual" in present else None,
        "weight": random(channels, seed=3),
        "bias": random(channels, seed=4) if "centered" in present else None,
        "cos": angles.cos() if "rotary" in present else None,
        "sin": angles.sin() if "rotary" in present else None,
        "scale": random(shape[0], seed=6) if "scale" in present else None,
    }


def assert_matches(inputs: dict[str, Tensor | None], dtype: torch.dtype = torch.float32) -> None:
    """Both results and every gradient; the rotary tables and factors have none."""
    given = {name: inputs[name] for name in ("cos", "sin", "scale")}
    learned = {name: x for name, x in inputs.items() if name not in given}

    def both(op):
        return lambda **x: torch.cat([result.float() for result in op(**x, **given)])

    def both_in_float64(**x):
        return torch.cat(residual_norm_reference(**x, **given))

    assert_matches_reference(both(residual_norm), both_in_float64, learned, dtype)


def test_reference_is_scale_add_turn_and_norm() -> None:
    inputs = in_float64(norm_inputs())
    angles = torch.atan2(inputs["sin"], inputs["cos"])[..., ::2]
    added = inputs["hidden"] * inputs["scale"][:, None, None] + inputs["residual"]
    pairs = torch.view_as_complex(added.unflatten(-1, (-1, 2)))
    expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    norm = torch.nn.LayerNorm(20, dtype=torch.float64)
    norm.weight.data, norm.bias.data = inputs["weight"], inputs["bias"]
    normed, stream = residual_norm_reference(**inputs)
    assert relative_error(stream, expected) < 1e-7, "the tables are float32"
    assert relative_error(normed, norm(stream)) < 1e-14


@pytest.mark.parametrize("present", COMBINATIONS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 2), (5, 8), (2, 21, 20), (3, 4, 5, 48), (1, 300, 34)], ids=str
)
def test_matches_reference(shape: tuple[int, ...], present: str) -> None:
    assert_matches(norm_inputs(present, shape))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(layout: str) -> None:
    inputs = norm_inputs()
    assert_matches({name: LAYOUTS[layout](x) for name, x in inputs.items()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    inputs = norm_inputs(dtype=dtype)
    normed, stream = residual_norm(**inputs)
    assert normed.dtype == stream.dtype == torch.float32, "the stream keeps its precision"
    assert_matches(inputs, dtype)


@pytest.mark.parametrize("present", COMBINATIONS)
@pytest.mark.usefixtures("poisoned_memory")
def test_writes_every_cell(present: str) -> None:
    assert_matches(norm_inputs(present, (2, 40, 22)))


def test_one_result_alone_has_gradients_too() -> None:
    for used in (0, 1):
        inputs = norm_inputs()
        hidden = inputs["hidden"].requires_grad_()
        residual_norm(**inputs)[used].square().sum().backward()
        truth = in_float64(inputs)
        expected = truth["hidden"].requires_grad_()
        residual_norm_reference(**truth)[used].square().sum().backward()
        assert relative_error(hidden.grad, expected.grad) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_dropped_image_adds_nothing(dtype: torch.dtype) -> None:
    inputs = norm_inputs("residual scale centered", (3, 2, 4, 6)) | {
        "scale": torch.tensor([1, 0, 2])
    }
    inputs = {name: x if x is None else x.to(dtype) for name, x in inputs.items()}
    hidden, residual = inputs["hidden"].requires_grad_(), inputs["residual"].requires_grad_()
    scale = inputs["scale"].requires_grad_()
    normed, stream = residual_norm(**inputs)
    assert torch.equal(stream[1], residual[1])
    (normed * torch.arange(6)).sum().backward()
    assert not hidden.grad[1].any()
    torch.testing.assert_close(
        hidden.grad[[0, 2]], residual.grad[[0, 2]] * scale[[0, 2], None, None, None]
    )
    assert scale.grad is None


def test_empty_batch() -> None:
    inputs = norm_inputs(shape=(0, 3, 4))
    weight = inputs["weight"].requires_grad_()
    residual_norm(**inputs)[0].sum().backward()
    assert not weight.grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": random(20)}, "hidden must be [..., L, C], got 1 axes"),
        ({"residual": random(1, 21, 20)}, "residual must be [2, 21, 20], got [1, 21, 20]"),
        ({"residual": random(42, 20)}, "residual must be [2, 21, 20], got [42, 20]"),
        ({"weight": random(19)}, "weight must be [20], got [19]"),
        ({"weight": random(1)}, "weight must be [20], got [1]"),
        ({"bias": random(1, 20)}, "bias must be [20], got [1, 20]"),
        ({"cos": random(1, 20, 20)}, "cos must be [1, 21, 20], got [1, 20, 20]"),
        ({"sin": random(21, 20)}, "sin must be [1, 21, 20], got [21, 20]"),
        ({"sin": random(1, 21, 10)}, "sin must be [1, 21, 20], got [1, 21, 10]"),
        ({"scale": random(1)}, "scale must be [2], got [1]"),
        ({"scale": random(2, 1, 1)}, "scale must be [2], got [2, 1, 1]"),
        ({"cos": None}, "cos and sin must be given together, got sin alone"),
        ({"sin": None}, "cos and sin must be given together, got cos alone"),
    ],
)
def test_bad_input_in_one_line(change: dict[str, Tensor | None], message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        residual_norm(**(norm_inputs() | change))
    assert message in str(error.value)


def test_tables_need_an_even_width() -> None:
    tables = random(2, 1, 21, 19)
    with pytest.raises(ValueError, match="rotate pairs of channels, got 19 channels"):
        residual_norm(random(2, 21, 19), None, random(19), None, *tables)


@pytest.mark.parametrize("present", [COMBINATIONS[0], COMBINATIONS[-1]])
@pytest.mark.parametrize("shape", [(2, 21, 20), (3, 4, 5, 48)], ids=str)
def test_compiles_whole_and_scripts(shape: tuple[int, ...], present: str) -> None:
    inputs = norm_inputs(present, shape)
    expected = residual_norm(**inputs)
    for make in (
        torch.jit.script,
        lambda op: torch.compile(op, fullgraph=True, backend="aot_eager"),
    ):
        for actual, wanted in zip(make(residual_norm)(**inputs), expected, strict=True):
            assert torch.equal(actual, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("present", [COMBINATIONS[0], COMBINATIONS[-1]])
def test_operator_contract(present: str, dtype: torch.dtype) -> None:
    inputs = norm_inputs(present, (2, 3, 4), dtype)
    *learned, cos, sin, scale = inputs.values()
    tensors = [x if x is None else x.to(dtype).requires_grad_() for x in learned]
    arguments = (*tensors, cos, sin, scale, 1e-5, dtype)
    torch.library.opcheck(torch.ops.localmamba.residual_norm, arguments)


def test_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        normed, stream = residual_norm(**norm_inputs())
    assert (normed.dtype, stream.dtype) == (torch.bfloat16, torch.float32)


def reference_token_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return residual_norm_reference(x, None, weight, bias)[0]


def token_inputs(
    present: str, shape=(2, 3, 5, 20), dtype=torch.float32
) -> dict[str, Tensor | None]:
    hidden, _, weight, bias, *_ = norm_inputs(present, shape, dtype).values()
    return {"x": hidden, "weight": weight, "bias": bias}


@pytest.mark.parametrize("present", ["", "centered"])
@pytest.mark.parametrize("layout", [None, *LAYOUTS])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.usefixtures("poisoned_memory")
def test_norm_alone(dtype: torch.dtype, layout: str | None, present: str) -> None:
    inputs = token_inputs(present, dtype=dtype)
    if layout is not None:
        inputs = {n: x if x is None else LAYOUTS[layout](x) for n, x in inputs.items()}
    if dtype == torch.float64:
        inputs = in_float64(inputs)
    assert_matches_reference(token_norm, reference_token_norm, inputs, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("present", ["", "centered"])
def test_operator_contract_of_the_norm_alone(present: str, dtype: torch.dtype) -> None:
    inputs = token_inputs(present, (2, 3, 4), dtype).values()
    tensors = [x if x is None else x.requires_grad_() for x in inputs]
    torch.library.opcheck(torch.ops.localmamba.token_norm, (*tensors, 1e-5, torch.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": random(20)}, "x must be [..., L, C], got 1 axes"),
        ({"weight": random(19)}, "weight must be [20], got [19]"),
        ({"bias": random(1)}, "bias must be [20], got [1]"),
    ],
)
def test_bad_input_of_the_norm_alone(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        token_norm(**(token_inputs("centered") | change))
    assert message in str(error.value)
