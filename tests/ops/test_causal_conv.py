"""The causal convolution along scan orders: against PyTorch's, and on hostile input."""

import pytest
import torch
import torch.nn.functional as F
from helpers import LAYOUTS, assert_matches_reference, random, relative_error
from torch import Tensor

from localmamba.ops import causal_conv, scan_index, scan_order
from localmamba.ops.causal_conv.reference import causal_conv_reference

DIRECTIONS = ["h", "v_flip", "w2", "w5_flip"]


def conv_inputs(
    grid: tuple[int, int],
    batch: int = 2,
    channels: int = 20,
    width: int = 4,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    directions = len(DIRECTIONS)
    return {
        "x": random(batch, grid[0] * grid[1], channels, seed=1, dtype=dtype),
        "weight": random(directions, channels, width, seed=2),
        "bias": random(directions, channels, seed=3),
        "index": scan_index(torch.empty(0), DIRECTIONS, *grid),
    }


def test_reference_is_a_convolution() -> None:
    grid = (3, 5)
    inputs = conv_inputs(grid, dtype=torch.float64)
    u = causal_conv_reference(**inputs)
    for k, name in enumerate(DIRECTIONS):
        order = torch.from_numpy(scan_order(name, grid).index.copy()).long()
        tokens = inputs["x"][:, order.clamp(min=0)] * (order >= 0)[:, None]
        weight, bias = (inputs[p][k].double() for p in ("weight", "bias"))
        expected = F.conv1d(tokens.mT, weight[:, None], bias, padding=3, groups=20)
        expected = F.silu(expected[..., : len(order)]).mT
        assert relative_error(u[:, k, : len(order)], expected) < 1e-14


def test_gradients_in_float64() -> None:
    inputs = {k: x.double() if k != "index" else x for k, x in conv_inputs((2, 3), 2, 2).items()}
    index = inputs.pop("index")
    tensors = [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *x: causal_conv(*x, index), tensors)


@pytest.mark.parametrize("width", [1, 2, 4, 7, 70])
@pytest.mark.parametrize("channels", [1, 16, 70])
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (9, 15)], ids=lambda g: f"{g[0]}x{g[1]}")
def test_matches_reference(grid: tuple[int, int], channels: int, width: int) -> None:
    inputs = conv_inputs(grid, channels=channels, width=width)
    assert_matches_reference(causal_conv, causal_conv_reference, inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(layout: str) -> None:
    inputs = conv_inputs((3, 5))
    for name in ("x", "weight", "bias"):
        inputs[name] = LAYOUTS[layout](inputs[name])
    dy = LAYOUTS[layout](random(2, 4, inputs["index"].shape[1], 20).double())
    assert_matches_reference(causal_conv, causal_conv_reference, inputs, dy=dy)


def test_expanded_inputs_and_gradients() -> None:
    inputs = conv_inputs((3, 5))
    inputs["x"] = inputs["x"][:1, :1].expand(2, 15, 20)
    dy = torch.tensor(0.5).double()
    assert_matches_reference(causal_conv, causal_conv_reference, inputs, dy=dy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    inputs = conv_inputs((3, 5), dtype=dtype)
    assert_matches_reference(causal_conv, causal_conv_reference, inputs, dtype)


@pytest.mark.usefixtures("poisoned_memory")
def test_writes_every_cell() -> None:
    inputs = conv_inputs((9, 11), channels=21)
    assert_matches_reference(causal_conv, causal_conv_reference, inputs)


def test_empty_batch() -> None:
    inputs = conv_inputs((3, 5), batch=0)
    weight = inputs["weight"].requires_grad_()
    u = causal_conv(**inputs)
    u.sum().backward()
    assert u.shape == (0, 4, inputs["index"].shape[1], 20)
    assert not weight.grad.any()


def test_memory_lies_ready_for_the_projections() -> None:
    assert causal_conv(**conv_inputs((3, 5))).transpose(0, 1).is_contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": random(15, 20)}, "x must be [B, L, D], got 2 axes"),
        ({"weight": random(4, 19, 4)}, "weight must be [4, 20, W], got [4, 19, 4]"),
        ({"weight": random(4, 20)}, "weight must be"),
        ({"index": torch.zeros(4, dtype=torch.int32)}, "index must be [K, P], got 1 axes"),
        ({"bias": random(3, 20)}, "bias must be [4, 20], got [3, 20]"),
    ],
)
def test_bad_input_in_one_line(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        causal_conv(**(conv_inputs((3, 5)) | change))
    assert message in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_operator_contract(dtype: torch.dtype) -> None:
    *tensors, index = conv_inputs((2, 3), 2, 3, dtype=dtype).values()
    arguments = [x.requires_grad_() for x in tensors]
    torch.library.opcheck(torch.ops.localmamba.causal_conv, (*arguments, index))


def test_compiles_whole() -> None:
    compiled = torch.compile(causal_conv, fullgraph=True, backend="aot_eager")
    assert_matches_reference(compiled, causal_conv_reference, conv_inputs((3, 5)))


def test_autocast_rounds_tokens_alone() -> None:
    inputs = conv_inputs((3, 5))
    with torch.autocast("cpu", torch.bfloat16):
        u = causal_conv(**inputs)
    assert u.dtype == torch.bfloat16
    assert torch.equal(u, causal_conv(**inputs | {"x": inputs["x"].bfloat16()}))
