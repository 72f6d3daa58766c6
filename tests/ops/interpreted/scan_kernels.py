"""The Triton scan in Triton's interpreter; test_triton_interpreter.py runs this file."""

import pytest
import torch
from kernel_cases import (
    DTYPES,
    check_kernels,
    expanded,
    run_kernels,
)
from ops.helpers import LAYOUTS
from scan_cases import (
    SMALL_SCANS,
    ScanCase,
    extreme_scan,
    scan_arguments,
    scan_gradient,
)

from localmamba.ops._common import triton_math as common
from localmamba.ops.selective_scan import cuda as kernels
from localmamba.ops.selective_scan import (
    triton_scan_backward,
    triton_scan_forward,
    triton_segments,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BOTH_ORDERS = SMALL_SCANS[:2]


def check(case, dtype=torch.float32, layout=torch.clone, gradient_layout=torch.clone):
    tensors, rest = scan_arguments(case, dtype, layout=layout)
    dy = scan_gradient(case, dtype, layout=gradient_layout)
    check_kernels("selective_scan", "triton", dy, tensors, rest, dtype)


@pytest.mark.parametrize("case", SMALL_SCANS, ids=str)
def test_float32(case):
    check(case)


@pytest.mark.parametrize("case", BOTH_ORDERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(case, dtype):
    check(case, dtype)


def test_mixed_dtypes():
    case = BOTH_ORDERS[0]
    tensors, rest = scan_arguments(case, torch.float32)
    dtypes = {"u": torch.bfloat16, "B": torch.float16, "z": torch.bfloat16, "D": torch.float16}
    mixed = {name: x.to(dtypes.get(name, x.dtype)) for name, x in tensors.items()}
    dy = scan_gradient(case, torch.bfloat16)
    check_kernels("selective_scan", "triton", dy, mixed, rest, torch.bfloat16)


@pytest.mark.parametrize("case", BOTH_ORDERS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_hostile_memory(case, layout):
    check(case, layout=layout, gradient_layout=expanded)
    check(ScanCase("small", ("h",), (2, 2)), gradient_layout=layout)


@pytest.mark.parametrize("case", BOTH_ORDERS, ids=str)
@pytest.mark.parametrize(("segments", "segment_chunks"), [(1, 3), (2, 2), (3, 1)])
def test_segments_of_time(case, segments, segment_chunks, monkeypatch):
    """Many sequences walk their chunks in order; few long ones are cut into segments."""

    def forced(*args):
        shape = common.scan_launch(*args)
        return shape._replace(segments=segments, segment_chunks=segment_chunks)

    for module in (triton_scan_forward, triton_scan_backward):
        monkeypatch.setattr(module, "scan_launch", forced)
    for module in (triton_scan_forward, triton_scan_backward, triton_segments):
        monkeypatch.setattr(module, "CHUNK", 8)  # of 24 steps
    check(case)


def test_states_are_kept_on_demand_and_made_again_where_not():
    tensors, rest = scan_arguments(BOTH_ORDERS[0], torch.float32)
    dy = scan_gradient(BOTH_ORDERS[0], torch.float32)
    y, states = kernels.scan_forward(*tensors.values(), *rest, False)
    kept, all_states = kernels.scan_forward(*tensors.values(), *rest, True)
    assert torch.equal(y, kept)
    assert (states.shape, all_states.shape) == ((1, 2, 0, 4, 6), (1, 2, 1, 4, 6))
    gradients = kernels.scan_backward(dy, *tensors.values(), *rest, states)
    expected = kernels.scan_backward(dy, *tensors.values(), *rest, all_states)
    for one, other in zip(gradients, expected, strict=True):
        assert torch.equal(one, other)


def test_index_of_another_integer_type_and_layout():
    tensors, (index, *rest) = scan_arguments(BOTH_ORDERS[0], torch.float32)
    dy = scan_gradient(BOTH_ORDERS[0], torch.float32)
    other = index.long().t().contiguous().t()
    check_kernels("selective_scan", "triton", dy, tensors, (other, *rest), torch.float32)


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_steps_and_decays_stay_finite(dtype):
    """Decays of 0 and 1. In float16 the output saturates; gradients may overflow, not be NaN."""
    dy, tensors, rest = extreme_scan(dtype)
    if dtype == torch.float32:
        check_kernels("selective_scan", "triton", dy, tensors, rest, dtype)
    results = run_kernels("selective_scan", "triton", dy, tensors, rest)
    assert results["output"].isfinite().all()
    for name, x in results.items():
        assert not (x.isnan() if dtype == torch.float16 else ~x.isfinite()).any(), name


def test_no_images():
    tensors, rest = scan_arguments(ScanCase("none", ("h",), (2, 2), images=0), torch.float32)
    results = run_kernels("selective_scan", "triton", torch.empty(0, 1, 4, 6), tensors, rest)
    assert results["output"].shape == (0, 1, 4, 6)
    assert torch.equal(results["dA"], torch.zeros(1, 6, 4))
