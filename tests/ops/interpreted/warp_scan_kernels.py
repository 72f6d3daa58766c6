"""scan.cu on a CPU, against the float64 reference; what goes with it in Triton's interpreter.

test_triton_interpreter.py runs this file.
"""

import shutil

import pytest
import torch
from kernel_cases import (
    DTYPES,
    check_kernels,
    run_kernels,
)
from ops.helpers import LAYOUTS
from ops.interpreted.cuda_on_cpu import Emulator
from scan_cases import (
    NO_GATE,
    ScanCase,
    extreme_scan,
    scan_arguments,
    scan_gradient,
)

from localmamba.ops._common import nvrtc
from localmamba.ops.selective_scan import warp_scan

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory", "emulated"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]

CASES = [
    ScanCase(name, directions, grid, channels, 16, order=order, options=options, images=2)
    for name, directions, grid, channels, order, options in (
        ("grid order, padding", ("h", "w2_flip"), (3, 5), 64, "grid", NO_GATE),
        ("scan order, padding", ("v", "w2"), (3, 5), 32, "scan", NO_GATE),
        ("several chunks", ("w7", "v_flip"), (9, 11), 32, "grid", NO_GATE),
        ("no index", ("h", "v"), (3, 3), 32, "none", NO_GATE),
        ("one token", ("h", "v"), (1, 1), 32, "grid", NO_GATE),
        ("nothing but the scan", ("w7", "h"), (6, 8), 32, "grid", ()),
    )
]

LANES = {"one lane": 0, "two lanes": 1, "four lanes": 2, "segments": 1000}
"""How a pass is cut, and how many programs make a wave, in programs of the case."""


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return Emulator(tmp_path_factory.mktemp("scan"))


@pytest.fixture
def emulated(monkeypatch, emulator):
    monkeypatch.setattr(nvrtc, "launch", emulator.launch)


def cut(monkeypatch, case, lanes):
    programs = case.images * len(case.directions) * case.channels // 32
    monkeypatch.setattr(warp_scan, "WAVE", LANES[lanes] * programs)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize(
    ("case", "dtype"), [(case, DTYPES[i % 3]) for i, case in enumerate(CASES)], ids=str
)
def test_scan(case, dtype, lanes, monkeypatch):
    cut(monkeypatch, case, lanes)
    tensors, rest = scan_arguments(case, dtype)
    check_kernels("selective_scan", "cuda_cpp", scan_gradient(case, dtype), tensors, rest, dtype)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_hostile_memory(layout):
    tensors, rest = scan_arguments(CASES[0], torch.float32, layout=layout)
    dy = layout(scan_gradient(CASES[0], torch.float32))
    check_kernels("selective_scan", "cuda_cpp", dy, tensors, rest, torch.float32)


@pytest.mark.parametrize("lanes", LANES)
def test_large_steps_and_outputs(lanes, monkeypatch):
    """As after training with a large learning rate: outputs of a million and more."""
    case = CASES[2]
    cut(monkeypatch, case, lanes)
    tensors, rest = scan_arguments(case, torch.float32)
    tensors |= {"dt": 30 * tensors["dt"], "B": 100 * tensors["B"], "C": 100 * tensors["C"]}
    dy = 1e-6 * scan_gradient(case, torch.float32)
    check_kernels("selective_scan", "cuda_cpp", dy, tensors, rest, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_steps_and_decays_stay_finite(dtype):
    """Decays of 0 and 1. In float16 the output saturates; gradients may overflow, not be NaN."""
    dy, tensors, rest = extreme_scan(dtype, channels=32, states=16)
    results = run_kernels("selective_scan", "cuda_cpp", dy, tensors, rest)
    assert results["output"].isfinite().all()
    for name, x in results.items():
        assert not (x.isnan() if dtype == torch.float16 else ~x.isfinite()).any(), name
