"""The depthwise convolution over a map of tokens: against PyTorch's, and on hostile input."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    FORWARD_TOLERANCE,
    LAYOUTS,
    assert_matches_reference,
    random,
    relative_error,
)
from torch import Tensor

from localmamba.ops import depthwise_conv
from localmamba.ops.depthwise_conv.reference import depthwise_conv_reference

GRIDS = pytest.mark.parametrize(
    "grid", [(1, 1), (1, 8), (9, 1), (7, 9), (14, 17)], ids=lambda g: f"{g[0]}x{g[1]}"
)


def conv_inputs(
    grid: tuple[int, int] = (7, 9),
    batch: int = 2,
    channels: int = 20,
    size: int = 3,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor | None]:
    return {
        "x": random(batch, *grid, channels, seed=1, dtype=dtype),
        "weight": random(channels, 1, size, size, seed=2),
        "bias": random(channels, seed=3) if bias else None,
    }


def assert_matches(inputs: dict[str, Tensor | None], dtype: torch.dtype = torch.float32) -> None:
    assert_matches_reference(depthwise_conv, depthwise_conv_reference, inputs, dtype)


@pytest.mark.parametrize("size", [1, 3, 5])
@GRIDS
def test_reference_is_a_convolution(grid: tuple[int, int], size: int) -> None:
    x, weight, bias = (x.double() for x in conv_inputs(grid, size=size).values())
    expected = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=size // 2, groups=20)
    expected = F.silu(expected).permute(0, 2, 3, 1)
    assert relative_error(depthwise_conv_reference(x, weight, bias), expected) < 1e-14


@pytest.mark.parametrize("size", [1, 3])
def test_gradients_in_float64(size: int) -> None:
    inputs = conv_inputs((2, 3), channels=2, size=size).values()
    tensors = [x.double().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(depthwise_conv, tensors)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("channels", [1, 70])
@GRIDS
def test_matches_reference(grid: tuple[int, int], channels: int, size: int, bias: bool) -> None:
    assert_matches(conv_inputs(grid, channels=channels, size=size, bias=bias))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(layout: str) -> None:
    inputs = {name: LAYOUTS[layout](x) for name, x in conv_inputs().items()}
    dy = LAYOUTS[layout](random(2, 7, 9, 20).double())
    assert_matches_reference(depthwise_conv, depthwise_conv_reference, inputs, dy=dy)
    assert depthwise_conv(**inputs).is_contiguous()


def test_expanded_inputs_and_gradients() -> None:
    inputs = conv_inputs()
    inputs["x"] = inputs["x"][:1, :1, :1].expand(2, 7, 9, 20)
    dy = torch.tensor(0.5).double()
    assert_matches_reference(depthwise_conv, depthwise_conv_reference, inputs, dy=dy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [3, 5])
def test_half_precision(size: int, dtype: torch.dtype) -> None:
    assert_matches(conv_inputs(size=size, dtype=dtype), dtype)


def test_float16_saturates() -> None:
    inputs = conv_inputs(dtype=torch.float16)
    inputs["x"] = (inputs["x"] * 2e4).clamp(-65504, 65504)
    y = depthwise_conv(**inputs)
    assert y.isfinite().all()
    assert y.max() == 65504


@pytest.mark.usefixtures("poisoned_memory")
def test_writes_every_cell() -> None:
    assert_matches(conv_inputs((9, 11), channels=21))


def test_empty_batch() -> None:
    inputs = conv_inputs(batch=0)
    weight = inputs["weight"].requires_grad_()
    y = depthwise_conv(**inputs)
    y.sum().backward()
    assert y.shape == (0, 7, 9, 20)
    assert not weight.grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": random(63, 20)}, "x must be [B, H, W, D], got 2 axes"),
        ({"weight": random(19, 1, 3, 3)}, "weight must be [20, 1, S, S] with S odd, got [19"),
        ({"weight": random(20, 1, 4, 4)}, "weight must be [20, 1, S, S] with S odd, got [20"),
        ({"weight": random(20, 1, 5, 3)}, "with S odd, got [20, 1, 5, 3]"),
        ({"weight": random(20, 3)}, "weight must be [20, 1, S, S] with S odd, got [20, 3]"),
        ({"weight": random(20, 3, 3)}, "weight must be [20, 1, S, S] with S odd, got [20, 3, 3]"),
        ({"weight": torch.tensor(1.0)}, "weight must be [20, 1, S, S] with S odd, got []"),
        ({"bias": random(19)}, "bias must be [20], got [19]"),
    ],
)
def test_bad_input_in_one_line(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        depthwise_conv(**(conv_inputs() | change))
    assert message in str(error.value)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_operator_contract(dtype: torch.dtype, bias: bool) -> None:
    inputs = conv_inputs((2, 3), 2, 3, bias=bias, dtype=dtype).values()
    arguments = tuple(x if x is None else x.requires_grad_() for x in inputs)
    torch.library.opcheck(torch.ops.localmamba.depthwise_conv, arguments)


def test_operator_contract_of_half_a_projection() -> None:
    """The mixer's map: the first half of wider rows."""
    x, weight, bias = conv_inputs(channels=6).values()
    x = torch.cat((x, x), dim=-1).requires_grad_().chunk(2, dim=-1)[0]
    arguments = (x, weight.requires_grad_(), bias.requires_grad_())
    torch.library.opcheck(torch.ops.localmamba.depthwise_conv, arguments)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_compiles_whole(bias: bool) -> None:
    compiled = torch.compile(depthwise_conv, fullgraph=True, backend="aot_eager")
    assert_matches_reference(compiled, depthwise_conv_reference, conv_inputs(bias=bias))


def test_scripts() -> None:
    inputs = conv_inputs()
    assert torch.equal(torch.jit.script(depthwise_conv)(**inputs), depthwise_conv(**inputs))


def test_autocast_rounds_the_map_alone() -> None:
    """What is left of a sum that nearly cancels tells which of its parts were rounded."""
    x = torch.full((1, 2, 3, 4), 1 + 2**-9)  # 1 in bfloat16
    weight = torch.full((4, 1, 1, 1), 1 + 2**-9)
    bias = torch.full((4,), -1 - 2**-10)  # -1 in bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        y = depthwise_conv(x, weight, bias)
    assert y.dtype == torch.bfloat16
    truth = depthwise_conv_reference(x.bfloat16().double(), weight.double(), bias.double())
    assert relative_error(y, truth) < FORWARD_TOLERANCE[torch.bfloat16]
