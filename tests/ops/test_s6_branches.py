"""A block's branches as one op: the same as its parts, composed."""

import pytest
import torch
from helpers import (
    FORWARD_TOLERANCE,
    LAYOUTS,
    assert_matches_reference,
    in_float64,
    random,
    relative_error,
)
from torch import Tensor

from localmamba.ops import combine_directions, pool_directions, s6_branches, scan_index
from localmamba.ops.causal_conv.reference import causal_conv_reference
from localmamba.ops.selective_scan.reference import selective_scan_reference

DIRECTIONS = ["h", "v_flip", "w2"]


def branch_inputs(
    grid: tuple[int, int] = (3, 5),
    conv: bool = True,
    batch: int = 2,
    channels: int = 20,
    states: int = 4,
    rank: int = 3,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor | None]:
    directions = len(DIRECTIONS)
    return {
        "x": random(batch, grid[0] * grid[1], channels, seed=1, dtype=dtype),
        "x_proj": random(directions, rank + 2 * states, channels, seed=2) / channels**0.5,
        "dt_weight": random(directions, channels, rank, seed=3) / rank**0.5,
        "dt_bias": random(directions, channels, seed=4) - 2,
        "A": -torch.exp(random(directions, channels, states, seed=5)),
        "D": random(directions, channels, seed=6),
        "index": scan_index(torch.empty(0), DIRECTIONS, *grid),
        "conv_weight": random(directions, channels, 4, seed=7) if conv else None,
        "conv_bias": random(directions, channels, seed=8) if conv else None,
    }


def branches_by_parts(
    x, x_proj, dt_weight, dt_bias, A, D, index, conv_weight=None, conv_bias=None
) -> Tensor:
    """The branches from the references of the parts, and einsum between them."""
    states, rank = A.shape[2], dt_weight.shape[2]
    if conv_weight is None:
        u = x
        params = torch.einsum("bld,kmd->bklm", u, x_proj)
    else:
        u = causal_conv_reference(x, conv_weight, conv_bias, index)
        params = torch.einsum("bkld,kmd->bklm", u, x_proj)
    factor, B, C = params.split([rank, states, states], dim=-1)
    dt = torch.einsum("bklr,kdr->bkld", factor, dt_weight)
    return selective_scan_reference(u, dt, A, B, C, D, None, dt_bias, index, x.shape[1])


CONVOLUTION = pytest.mark.parametrize("conv", [True, False], ids=["convolution", "plain"])


@CONVOLUTION
@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (9, 15)], ids=lambda g: f"{g[0]}x{g[1]}")
def test_is_its_parts(grid: tuple[int, int], rank: int, conv: bool) -> None:
    inputs = branch_inputs(grid, conv, rank=rank)
    assert_matches_reference(s6_branches, branches_by_parts, inputs)


@CONVOLUTION
def test_is_its_parts_in_float64(conv: bool) -> None:
    inputs = in_float64(branch_inputs(conv=conv))
    assert_matches_reference(s6_branches, branches_by_parts, inputs, torch.float64)


@CONVOLUTION
def test_gradients_in_float64(conv: bool) -> None:
    inputs = in_float64(branch_inputs((2, 2), conv, 2, 3, 2, 2))
    index = inputs.pop("index")
    names = [name for name, x in inputs.items() if x is not None]
    tensors = [inputs[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(
        lambda *x: s6_branches(**dict(zip(names, x, strict=True)), index=index), tensors
    )


@CONVOLUTION
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(layout: str, conv: bool) -> None:
    inputs = branch_inputs(conv=conv)
    hostile = {
        name: LAYOUTS[layout](x) if isinstance(x, Tensor) and name != "index" else x
        for name, x in inputs.items()
    }
    dy = LAYOUTS[layout](random(2, 3, 15, 20).double())
    assert_matches_reference(s6_branches, branches_by_parts, hostile, dy=dy)


@CONVOLUTION
@pytest.mark.usefixtures("poisoned_memory")
def test_writes_every_cell(conv: bool) -> None:
    assert_matches_reference(s6_branches, branches_by_parts, branch_inputs((9, 11), conv))


@CONVOLUTION
def test_empty_batch(conv: bool) -> None:
    inputs = branch_inputs(conv=conv, batch=0)
    weight = inputs["x_proj"].requires_grad_()
    y = s6_branches(**inputs)
    y.sum().backward()
    assert y.shape == (0, 3, 15, 20)
    assert not weight.grad.any()


@CONVOLUTION
def test_autocast(conv: bool) -> None:
    """The result is of autocast's dtype; A, D and biases keep their precision."""
    inputs = branch_inputs(conv=conv)
    with torch.autocast("cpu", torch.bfloat16):
        y = s6_branches(**inputs)
    assert y.dtype == torch.bfloat16
    truth = branches_by_parts(**in_float64(inputs))
    assert relative_error(y, truth) < 2 * FORWARD_TOLERANCE[torch.bfloat16]


@CONVOLUTION
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_operator_contract(dtype: torch.dtype, conv: bool) -> None:
    inputs = branch_inputs((2, 3), conv, 2, 3, 2, 2, dtype)
    order = ("x", "conv_weight", "conv_bias", "x_proj", "dt_weight", "dt_bias", "A", "D")
    tensors = [x if x is None else x.requires_grad_() for x in map(inputs.get, order)]
    arguments = (*tensors, inputs["index"], True)
    torch.library.opcheck(torch.ops.localmamba.s6_branches, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": random(2, 15, 21)}, "x must be [B, L, 20], got [2, 15, 21]"),
        ({"x": random(15, 20)}, "x must be"),
        ({"x_proj": random(3, 10, 20)}, "x_proj must be [3, 11, 20], got [3, 10, 20]"),
        ({"dt_weight": random(3, 19, 3)}, "dt_weight must be [3, 20, R], got [3, 19, 3]"),
        ({"dt_weight": random(3, 20)}, "dt_weight must be [3, 20, R], got [3, 20]"),
        ({"dt_bias": random(1, 20)}, "dt_bias must be [3, 20], got [1, 20]"),
        ({"A": random(20, 4)}, "A must be [K, D, N], got 2 axes"),
        ({"D": random(3, 19)}, "D must be [3, 20], got [3, 19]"),
        ({"index": torch.zeros(2, 15, dtype=torch.int32)}, "index must be [3, P], got [2, 15]"),
        ({"index": torch.zeros(3, dtype=torch.int32)}, "index must be [3, P], got [3]"),
        ({"conv_weight": random(2, 20, 4)}, "conv_weight must be [3, 20, W], got [2, 20, 4]"),
        ({"conv_weight": random(3, 20)}, "conv_weight must be [3, 20, W], got [3, 20]"),
        ({"conv_bias": random(20)}, "conv_bias must be [3, 20], got [20]"),
        ({"conv_bias": None}, "conv_bias must be given together, got conv_weight alone"),
    ],
)
def test_bad_input_in_one_line(change: dict[str, Tensor | None], message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        s6_branches(**(branch_inputs() | change))
    assert message in str(error.value)


class _Block(torch.nn.Module):
    """What a layer makes of the ops: scan order, branches, pooling, combination."""

    def __init__(self, inputs: dict[str, Tensor | None]):
        super().__init__()
        for name, x in inputs.items():
            if x is not None and name not in ("x", "index"):
                self.register_parameter(name, torch.nn.Parameter(x))

    def forward(self, x: Tensor) -> Tensor:
        index = scan_index(x, DIRECTIONS, 3, 5)
        y = s6_branches(x, index=index, **dict(self.named_parameters()))
        weights = pool_directions(y, x, self.D[0], self.dt_bias[0])
        return combine_directions(y, weights.sigmoid(), None, x)


def test_compiles_whole_with_inductor() -> None:
    inputs = branch_inputs()
    block, x = _Block(inputs), inputs["x"].requires_grad_()
    expected = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
    compiled = torch.compile(block, fullgraph=True)
    actual = torch.autograd.grad(compiled(x).square().sum(), [x, *block.parameters()])
    for one, other in zip(actual, expected, strict=True):
        assert relative_error(one, other) < 1e-5


def test_export_with_any_batch() -> None:
    block = _Block(branch_inputs())
    program = torch.export.export(
        block,
        (branch_inputs()["x"],),
        dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
    )
    for batch in (1, 2, 5):
        x = branch_inputs(batch=batch)["x"]
        assert torch.equal(program.module()(x), block(x))
