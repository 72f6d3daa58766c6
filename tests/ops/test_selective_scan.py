"""The selective scan: the reference against a formula, the CPU kernels against the reference."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    FORWARD_TOLERANCE,
    LAYOUTS,
    assert_matches_reference,
    in_float64,
    random,
    relative_error,
    results_and_gradients,
    scan_inputs,
)
from torch import Tensor

from localmamba.ops import scan_index, scan_order, selective_scan
from localmamba.ops._common.backends import CHUNK
from localmamba.ops.selective_scan.reference import selective_scan_reference

DIRECTIONS = ["h", "v_flip", "w2", "w4_flip"]


def index_for(height: int, width: int, directions: list[str] = DIRECTIONS) -> Tensor:
    return scan_index(torch.empty(0), directions, height, width)


def scan_by_sums(u, dt, A, B, C, D, z, dt_bias, names, grid) -> Tensor:
    """The scan of inputs in grid order as explicit sums, one direction after the other, float64.

    y_t = sum over s <= t of C_t . (exp(A (S_t - S_s)) B_s) delta_s u_s + D u_t, S the running sum
    of the step sizes. A padded step has step size softplus(bias) and reads nothing.
    """
    out = torch.zeros(dt.shape, dtype=torch.float64)
    for k, name in enumerate(names):
        order = scan_order(name, grid)
        steps = torch.from_numpy(order.index.copy()).long()
        token = (steps >= 0)[:, None]
        reads = steps.clamp(min=0)
        delta = F.softplus(dt[:, k, reads] * token + dt_bias[k])
        running = delta.cumsum(1)
        between = running[:, :, None] - running[:, None]  # [B, t, s, D]
        causal = torch.ones(len(steps), len(steps)).tril()[None, :, :, None, None]
        decay = torch.exp((between[..., None] * A[k]).clamp(max=0)) * causal
        drive = delta * u[:, reads] * token
        y = torch.einsum("btn,btsdn,bsn,bsd->btd", C[:, k, reads], decay, B[:, k, reads], drive)
        y = y + D[k] * u[:, reads]
        out[:, k] = y[:, torch.from_numpy(order.inverse.copy()).long()]
    return out * F.silu(z)[:, None]


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (4, 4)], ids=str)
def test_reference_is_the_formula(grid: tuple[int, int]) -> None:
    index = index_for(*grid)
    inputs = in_float64(scan_inputs(index, grid[0] * grid[1], channels=3))
    expected = scan_by_sums(
        *[x for name, x in inputs.items() if name not in ("index", "length")], DIRECTIONS, grid
    )
    assert relative_error(selective_scan_reference(**inputs), expected) < 1e-12


@pytest.mark.parametrize("grid_order", [True, False])
@pytest.mark.parametrize("optional", [True, False])
def test_gradients_in_float64(grid_order: bool, optional: bool) -> None:
    index = index_for(2, 3, ["h", "w2_flip"])
    inputs = in_float64(scan_inputs(index, 6, 2, 2, 2, grid_order, optional))
    tensors = [
        x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in inputs.values()
    ][:8]
    assert torch.autograd.gradcheck(lambda *x: selective_scan(*x, index=index, length=6), tensors)


@pytest.mark.parametrize("grid_order", [True, False], ids=["grid order", "scan order"])
@pytest.mark.parametrize("states", [1, 4, 16, 20, 64])
@pytest.mark.parametrize("channels", [1, 16, 20, 70])
def test_matches_reference(channels: int, states: int, grid_order: bool) -> None:
    inputs = scan_inputs(index_for(3, 5), 15, 2, channels, states, grid_order)
    assert_matches_reference(selective_scan, selective_scan_reference, inputs)


@pytest.mark.parametrize("grid_order", [True, False], ids=["grid order", "scan order"])
@pytest.mark.parametrize(
    "absent", [("z",), ("D",), ("dt_bias",), ("z", "D", "dt_bias")], ids="-".join
)
def test_without_optional_inputs(absent: tuple[str, ...], grid_order: bool) -> None:
    inputs = scan_inputs(index_for(3, 5), 15, grid_order=grid_order)
    inputs |= dict.fromkeys(absent)
    assert_matches_reference(selective_scan, selective_scan_reference, inputs)


@pytest.mark.parametrize("grid_order", [True, False], ids=["grid order", "scan order"])
@pytest.mark.parametrize(
    "grid", [(1, 1), (1, 9), (8, 8), (5, 13), (9, 22)], ids=lambda g: f"{g[0]}x{g[1]}"
)
def test_grids_and_chunks(grid: tuple[int, int], grid_order: bool) -> None:
    assert CHUNK in (8 * 8, 64), "the grids lie around one and several chunks"
    inputs = scan_inputs(index_for(*grid), grid[0] * grid[1], channels=7, grid_order=grid_order)
    assert_matches_reference(selective_scan, selective_scan_reference, inputs)


def test_without_index_and_without_softplus() -> None:
    inputs = scan_inputs(index_for(5, 14, ["h", "v"]), 70, grid_order=False)
    inputs |= {"index": None, "length": None, "dt": inputs["dt"].abs() / 10, "dt_bias": None}
    for softplus in (True, False):
        assert_matches_reference(
            lambda softplus=softplus, **x: selective_scan(**x, softplus=softplus),
            lambda softplus=softplus, **x: selective_scan_reference(**x, softplus=softplus),
            inputs,
        )


def test_growing_states() -> None:
    inputs = scan_inputs(index_for(3, 5), 15)
    inputs["A"] = -inputs["A"] / 8
    assert_matches_reference(selective_scan, selective_scan_reference, inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grid_order", [True, False], ids=["grid order", "scan order"])
def test_any_memory_layout(layout: str, grid_order: bool) -> None:
    inputs = scan_inputs(index_for(3, 5), 15, channels=18, grid_order=grid_order)
    change = LAYOUTS[layout]
    hostile = {
        name: change(x) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    assert_matches_reference(selective_scan, selective_scan_reference, hostile)


def test_expanded_inputs_and_gradients() -> None:
    inputs = scan_inputs(index_for(3, 5), 15)
    for name in ("u", "dt", "z"):
        inputs[name] = inputs[name][:1].expand(2, *inputs[name].shape[1:])
    dy = torch.tensor(1.5).double()
    assert_matches_reference(selective_scan, selective_scan_reference, inputs, dy=dy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grid_order", [True, False], ids=["grid order", "scan order"])
def test_half_precision(dtype: torch.dtype, grid_order: bool) -> None:
    inputs = scan_inputs(index_for(3, 5), 15, grid_order=grid_order, dtype=dtype)
    assert inputs["u"].dtype == dtype
    assert inputs["A"].dtype == torch.float32, "a mix of types"
    assert_matches_reference(selective_scan, selective_scan_reference, inputs, dtype)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("grid_order", [True, False], ids=["grid order", "scan order"])
@pytest.mark.parametrize("optional", [True, False])
def test_writes_every_cell(grid_order: bool, optional: bool) -> None:
    index = index_for(9, 11)
    inputs = scan_inputs(index, 99, 2, 21, 5, grid_order, optional)
    assert_matches_reference(selective_scan, selective_scan_reference, inputs)


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch: int) -> None:
    inputs = scan_inputs(index_for(3, 5), 15, batch=batch)
    results = results_and_gradients(selective_scan, inputs)
    assert results["out"].shape == (batch, 4, 15, 20)
    assert results["A"].shape == inputs["A"].shape
    assert batch or not results["A"].any()


EXTREME_DT = (-1e4, -90.0, -20.0, 0.0, 19.9, 20.1, 90.0, 1e4)
EXTREME_A = (-1e30, -200.0, -1.0, -1e-30, 0.0)


def test_decay_of_exactly_0_and_1() -> None:
    """Finite wherever the float64 reference is, and equal to it."""
    index = index_for(4, 6, ["h", "w5"])
    inputs = scan_inputs(index, 24, channels=24, states=5)
    inputs["A"] = torch.tensor(EXTREME_A).expand(2, 24, 5).clone()
    inputs["dt"] = torch.tensor(EXTREME_DT).repeat(3).expand(2, 2, 24, 24).clone()
    inputs["dt"][:, 1] = inputs["dt"][:, 0].transpose(1, 2)
    inputs["dt_bias"] = torch.zeros(2, 24)
    actual = results_and_gradients(selective_scan, inputs)
    expected = results_and_gradients(selective_scan_reference, in_float64(inputs))
    for name, truth in expected.items():
        assert truth.isfinite().all(), name
        assert actual[name].isfinite().all(), name
        if name != "A":  # there 1e-30 and 1e30 stand beside each other
            assert relative_error(actual[name], truth) < 1e-5, name


@pytest.mark.parametrize("name", ["u", "dt", "A", "B", "C", "D", "z", "dt_bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_nan_and_infinity_as_in_the_reference(name: str, value: float) -> None:
    inputs = scan_inputs(index_for(3, 4, ["h", "w2"]), 12, channels=17)
    inputs[name].flatten()[7] = value
    with torch.no_grad():
        actual, expected = selective_scan(**inputs), selective_scan_reference(**inputs)
    for mark in (torch.isnan, torch.isposinf, torch.isneginf):
        assert (mark(actual) == mark(expected)).all()
    finite = expected.isfinite()
    assert relative_error(actual[finite], expected[finite]) < 1e-6


def test_large_windows_of_step_sizes_lose_no_accuracy() -> None:
    """Decays from 2^-150 to 2^150 next to each other: both ways to compute a power are taken."""
    inputs = scan_inputs(index_for(8, 16, ["h"]), 128, channels=32, states=2, optional=False)
    inputs["dt"] = torch.linspace(-5, 5, 128)[:, None].expand(2, 1, 128, 32).clone()
    inputs["A"] = -torch.logspace(-3, 2, 64).view(1, 32, 2)
    assert_matches_reference(selective_scan, selective_scan_reference, inputs)


def test_index_of_another_integer_type() -> None:
    inputs = scan_inputs(index_for(3, 5), 15)
    expected = selective_scan(**inputs)
    inputs["index"] = inputs["index"].long().t().contiguous().t()
    assert torch.equal(selective_scan(**inputs), expected)


def test_a_wrong_index_stays_inside_the_tensors() -> None:
    """A compiled program does not check its index; kernels on a CPU read such tokens as padding."""
    inputs = scan_inputs(index_for(3, 5), 15)
    expected = selective_scan(**inputs)
    appended = torch.tensor([15, 2**31 - 1, -(2**31)], dtype=torch.int32).expand(4, 3)
    inputs["index"] = torch.cat((inputs["index"], appended), dim=1)
    with pytest.raises(ValueError, match="got token 15 at step"):
        selective_scan(**inputs)
    op = torch.ops.localmamba.selective_scan

    def unchecked(index, length, **tensors):
        return op(*tensors.values(), index, length, True, True)[0]

    results = results_and_gradients(unchecked, inputs)
    assert torch.equal(results["out"], expected)


def test_states_not_kept_are_made_again() -> None:
    """The op itself may be told to keep nothing; its gradient is the same."""
    inputs = scan_inputs(index_for(9, 9), 81)
    *tensors, index, length = [
        x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in inputs.values()
    ]
    gradients = []
    for save in (True, False):
        op = torch.ops.localmamba.selective_scan
        y = op(*tensors, index, length, True, save)[0]
        gradients.append(torch.autograd.grad(y.sum(), tensors))
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": None}, "needs an index"),
        ({"u": random(15, 20)}, "got 2 axes"),
        ({"u": torch.tensor(1.0), "index": None}, "got 0 axes"),
        ({"A": random(4, 20, 65)}, "N <= 64"),
        ({"A": random(4, 19, 4)}, "A must be"),
        ({"u": random(2, 3, 15, 20)}, "u has 3 directions, A has 4"),
        ({"dt": random(2, 4, 14, 20)}, "dt must be [2, 4, 15, 20], got [2, 4, 14, 20]"),
        ({"B": random(2, 4, 15, 3)}, "B and C must be [2, 4, 15, 4]"),
        ({"C": random(2, 4, 1, 4)}, "B and C must be"),
        ({"D": random(4, 19)}, "D must be [4, 20], got [4, 19]"),
        ({"dt_bias": random(1, 20)}, "dt_bias must be [4, 20], got [1, 20]"),
        ({"index": torch.zeros(3, 15, dtype=torch.int32)}, "does not fit 4 directions"),
        ({"index": torch.zeros(4, dtype=torch.int32)}, "index [4] does not fit 4 directions"),
        ({"length": 14}, "length 14 does not fit u of 15 tokens"),
        ({"z": random(2, 15, 21)}, "z must be [2, 15, 20], got [2, 15, 21]"),
        (
            {"index": None, "u": random(2, 4, 15, 20), "length": 20},
            "length 20 does not fit u of 15",
        ),
    ],
)
def test_bad_input_in_one_line(change: dict, message: str) -> None:
    inputs = scan_inputs(index_for(3, 5), 15) | change
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        selective_scan(**inputs)
    assert message in str(error.value)


@pytest.mark.parametrize("grid_order", [True, False], ids=["grid order", "scan order"])
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_operator_contract(dtype: torch.dtype, optional: bool, grid_order: bool) -> None:
    index = index_for(2, 3, ["h", "w2"])
    inputs = scan_inputs(index, 6, 2, 3, 2, grid_order, optional, dtype)
    tensors = [
        x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in inputs.values()
    ][:8]
    arguments = (*tensors, index, 6, True, True)
    torch.library.opcheck(torch.ops.localmamba.selective_scan, arguments)


def test_compiles_whole() -> None:
    inputs = scan_inputs(index_for(3, 5), 15)
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    assert_matches_reference(compiled, selective_scan_reference, inputs)


class _Scan(torch.nn.Module):
    def forward(self, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        index = scan_index(u, ["h", "w2"], 3, 5)
        return selective_scan(u, dt, A, B, C, index=index)


def test_export_with_any_batch() -> None:
    def arguments(batch: int) -> tuple[Tensor, ...]:
        inputs = scan_inputs(index_for(3, 5, ["h", "w2"]), 15, batch)
        return tuple(inputs[name] for name in ("u", "dt", "A", "B", "C"))

    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(
        _Scan(), arguments(2), dynamic_shapes=(batch, batch, None, batch, batch)
    )
    for size in (1, 2, 5):
        given = arguments(size)
        assert torch.equal(program.module()(*given), _Scan()(*given))


def test_autocast_rounds_activations_alone() -> None:
    inputs = scan_inputs(index_for(3, 5), 15)
    rounded = {"u", "dt", "B", "C", "z"}
    with torch.autocast("cpu", torch.bfloat16):
        y = selective_scan(**inputs)
    assert y.dtype == torch.bfloat16
    truth = {k: x.bfloat16() if k in rounded else x for k, x in inputs.items()}
    assert torch.equal(y, selective_scan(**truth))
    expected = selective_scan_reference(**in_float64(truth))
    assert relative_error(y, expected) < FORWARD_TOLERANCE[torch.bfloat16]


def test_torchscript() -> None:
    inputs = scan_inputs(index_for(3, 5), 15)
    with pytest.warns(FutureWarning):
        scripted: Callable[..., Tensor] = torch.jit.script(selective_scan)
    assert torch.equal(scripted(**inputs), selective_scan(**inputs))
