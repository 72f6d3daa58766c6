"""The scan's kernels on a GPU, in CUDA C++ and in Triton, against the float64 reference."""

from dataclasses import replace

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
    NO_GATE,
    SMALL_SCANS,
    ScanCase,
    extreme_scan,
    scan_arguments,
    scan_gradient,
)

pytest.importorskip("triton")

from localmamba.ops.selective_scan import cuda as scan
from localmamba.ops.selective_scan import warp_scan

pytestmark = pytest.mark.usefixtures("poisoned_memory")

both = pytest.mark.parametrize("kernels", ["triton", "cuda_cpp"])


def for_warps(name, directions, grid, channels=64, options=NO_GATE, **kwargs):
    """A case that scan.cu serves."""
    return ScanCase(name, directions, grid, channels, 16, options=options, **kwargs)


WARP_SCANS = (
    for_warps("grid order, padding", ("h", "w2_flip"), (3, 5), images=2),
    for_warps("scan order, padding", ("v", "w2"), (3, 5), order="scan"),
    for_warps("grid order, no padding", ("h_flip", "v"), (5, 3), channels=32, images=2),
    for_warps("scan order, no padding", ("v_flip", "h"), (2, 4), channels=96, order="scan"),
    for_warps("no index", ("h", "v"), (3, 3), order="none"),
    for_warps("class token", ("w2", "v_flip"), (3, 3), class_token=4),
    for_warps("one token", ("h", "v"), (1, 1)),
    for_warps("nothing but the scan", ("w7", "h"), (6, 8), options=()),
    for_warps("bias without softplus", ("w2",), (7, 9), options=("dt_bias",), order="scan"),
)

MANY = for_warps("many", ("h", "v_flip", "w2", "w7_flip"), (7, 10), channels=128, images=80)
"""More sequences than a GPU runs at once, each of two chunks."""
SOME = for_warps("some", ("h", "v_flip", "w2", "w7_flip"), (7, 10), channels=128, images=40)
"""Half as many: two lanes a channel."""
FEW = for_warps("few", ("h", "v_flip", "w2", "w7_flip"), (7, 10), channels=128, images=20)
"""Four lanes a channel."""
FEW_LONG = for_warps("few long", ("w7", "v_flip"), (30, 31))
"""Twenty chunks in padded windows, one a segment."""
LONG = for_warps("long", ("w7", "v_flip"), (40, 41), channels=256, images=16)
"""Several chunks a segment."""


def every_dtype_once(cases):
    """The first case in every dtype, the others in one each: kernels take seconds to compile."""
    rest = [(case, DTYPES[i % 3]) for i, case in enumerate(cases[1:])]
    pairs = [(cases[0], dtype) for dtype in DTYPES] + rest
    return pytest.mark.parametrize(("case", "dtype"), pairs, ids=str)


def check(kernels, case, dtype, layout=torch.clone, gradient_layout=torch.clone):
    tensors, rest = scan_arguments(case, dtype, "cuda", layout)
    dy = scan_gradient(case, dtype, "cuda", gradient_layout)
    check_kernels("selective_scan", kernels, dy, tensors, rest, dtype)


@every_dtype_once(SMALL_SCANS)
def test_triton(case, dtype):
    check("triton", case, dtype)


@every_dtype_once(WARP_SCANS)
def test_cuda_cpp(case, dtype):
    check("cuda_cpp", case, dtype)


@pytest.mark.parametrize("lanes", [2, 4])
@every_dtype_once(WARP_SCANS)
def test_lanes_a_channel(case, dtype, lanes, monkeypatch):
    programs = case.images * len(case.directions) * (case.channels // 32)
    monkeypatch.setattr(warp_scan, "WAVE", programs * lanes // 2)
    check("cuda_cpp", case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [MANY, SOME, FEW, FEW_LONG], ids=str)
def test_regimes_of_cuda_cpp(case, dtype):
    check("cuda_cpp", case, dtype)


@pytest.mark.parametrize(
    ("case", "dtype"), [(MANY, torch.bfloat16), (FEW_LONG, torch.bfloat16)], ids=str
)
def test_regimes_of_triton(case, dtype):
    check("triton", case, dtype)


@both
def test_several_chunks_a_segment(kernels):
    check(kernels, LONG, torch.bfloat16)


def test_long_sequences_of_64_states_with_a_gate():
    case = ScanCase("64 states", ("w7", "v_flip"), (12, 13), channels=40, states=64, images=2)
    check("triton", case, torch.float32)


@both
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("case", WARP_SCANS[:2], ids=str)
def test_hostile_memory(kernels, case, layout):
    check(kernels, case, torch.bfloat16, layout, expanded)
    check(kernels, case, torch.bfloat16, gradient_layout=layout)


def test_mixed_dtypes():
    case = replace(WARP_SCANS[0], options=("D", "z", "dt_bias", "softplus"))
    tensors, rest = scan_arguments(case, torch.float32, "cuda")
    dtypes = {"u": torch.bfloat16, "B": torch.float16, "z": torch.bfloat16, "D": torch.float16}
    mixed = {name: x.to(dtypes.get(name, x.dtype)) for name, x in tensors.items()}
    dy = scan_gradient(case, torch.float32, "cuda")
    check_kernels("selective_scan", "cuda", dy, mixed, rest, torch.bfloat16)


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_steps_and_decays_stay_finite(kernels, dtype):
    """Decays of 0 and 1. In float16 the output saturates; gradients may overflow, not be NaN."""
    dy, tensors, rest = extreme_scan(dtype, "cuda", channels=32, states=16)
    if dtype == torch.float32:
        check_kernels("selective_scan", kernels, dy, tensors, rest, dtype)
    results = run_kernels("selective_scan", kernels, dy, tensors, rest)
    assert results["output"].isfinite().all()
    for name, x in results.items():
        assert not (x.isnan() if dtype == torch.float16 else ~x.isfinite()).any(), name


@both
@pytest.mark.parametrize("case", [MANY, FEW_LONG], ids=str)
def test_two_runs_are_equal_bit_by_bit(kernels, case):
    tensors, rest = scan_arguments(case, torch.bfloat16, "cuda")
    dy = scan_gradient(case, torch.bfloat16, "cuda")
    first, second = (run_kernels("selective_scan", kernels, dy, tensors, rest) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


@pytest.mark.parametrize("case", [SMALL_SCANS[0], WARP_SCANS[0]], ids=["triton", "cuda_cpp"])
def test_states_not_kept_are_made_again(case):
    tensors, rest = scan_arguments(case, torch.bfloat16, "cuda")
    dy = scan_gradient(case, torch.bfloat16, "cuda")
    y, states = scan.scan_forward(*tensors.values(), *rest, False)
    kept, all_states = scan.scan_forward(*tensors.values(), *rest, True)
    assert states.numel() == 0
    assert torch.equal(y, kept)
    gradients = scan.scan_backward(dy, *tensors.values(), *rest, states)
    expected = scan.scan_backward(dy, *tensors.values(), *rest, all_states)
    for one, other in zip(gradients, expected, strict=True):
        assert one is other or torch.equal(one, other)


@both
def test_on_another_stream(kernels):
    """A kernel runs where PyTorch's current stream says."""
    tensors, rest = scan_arguments(FEW_LONG, torch.bfloat16, "cuda")
    dy = scan_gradient(FEW_LONG, torch.bfloat16, "cuda")
    expected = run_kernels("selective_scan", kernels, dy, tensors, rest)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = {name: x if x is None else x + 0 for name, x in tensors.items()}
        results = run_kernels("selective_scan", kernels, dy, late, rest)
    torch.cuda.current_stream().wait_stream(stream)
    for name, x in results.items():
        assert torch.equal(x, expected[name]), name
