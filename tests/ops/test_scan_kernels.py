"""The kernels of the selective scan on every backend: Numba, Triton, CUDA C++ of scan.cu."""

import importlib
import shutil
from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    DTYPES,
    check_kernels,
    each_dtype,
    each_layout,
    expanded,
    run_kernels,
)
from ops.backends import COMPILE, COMPUTE, CUDA, TRITON, Backend, each, on
from ops.cuda_on_cpu import Emulator
from ops.kernels import align_weights, kernels_of, patch, private, warp_scan_wave
from scan_cases import NO_GATE, SMALL_SCANS, ScanCase, check_extreme_scan, scan_arguments

pytestmark = pytest.mark.usefixtures("poisoned_memory")

F32, BF16, F16 = DTYPES
BOTH_ORDERS = SMALL_SCANS[:2]


def triton_or(backend: Backend) -> str:
    """The backend's kernels that serve any inputs."""
    return "triton" if backend.kernels == "cuda" else backend.kernels


def check(backend, kernels, case, dtype, layout=torch.clone, gradient_layout=torch.clone):
    arguments = scan_arguments(case, dtype, backend.device, layout, gradient_layout)
    check_kernels("selective_scan", backend, arguments, dtype, kernels)


def for_warps(name, directions, grid, channels=64, options=NO_GATE, **kwargs):
    """A case that scan.cu serves."""
    return ScanCase(name, directions, grid, channels, 16, options=options, **kwargs)


WARP_SCANS = (
    for_warps("grid order, padding", ("h", "w2_flip"), (3, 5), images=2),
    for_warps("scan order, padding", ("v", "w2"), (3, 5), 32, order="scan", images=2),
    for_warps("several chunks", ("w7", "v_flip"), (9, 11), 32, images=2),
    for_warps("no index", ("h", "v"), (3, 3), 32, order="none", images=2),
    for_warps("one token", ("h", "v"), (1, 1), 32, images=2),
    for_warps("nothing but the scan", ("w7", "h"), (6, 8), 32, options=(), images=2),
)
MORE_WARP_SCANS = (
    for_warps("scan order, padding, one image", ("v", "w2"), (3, 5), order="scan"),
    for_warps("grid order, no padding", ("h_flip", "v"), (5, 3), channels=32, images=2),
    for_warps("scan order, no padding", ("v_flip", "h"), (2, 4), channels=96, order="scan"),
    for_warps("no index, one image", ("h", "v"), (3, 3), order="none"),
    for_warps("class token", ("w2", "v_flip"), (3, 3), class_token=4),
    for_warps("one token, one image", ("h", "v"), (1, 1)),
    for_warps("nothing but the scan, one image", ("w7", "h"), (6, 8), options=()),
    for_warps("bias without softplus", ("w2",), (7, 9), options=("dt_bias",), order="scan"),
)

MANY = for_warps("many", ("h", "v_flip", "w2", "w7_flip"), (7, 10), channels=128, images=80)
"""More sequences than a GPU runs at once, each of two chunks."""
SOME = replace(MANY, name="some", images=40)
"""Half as many: two lanes a channel."""
FEW = replace(MANY, name="few", images=20)
"""Four lanes a channel."""
FEW_LONG = for_warps("few long", ("w7", "v_flip"), (30, 31))
"""Twenty chunks in padded windows, one a segment."""
LONG = for_warps("long", ("w7", "v_flip"), (40, 41), channels=256, images=16)
"""Several chunks a segment."""
WITH_64_STATES = ScanCase("long, 64 states", ("w7", "v_flip"), (12, 13), 40, 64, images=2)

SEEN = ("padding", "no index", "1 state", "33 channels", "64 states", "one channel", "nothing")
COMPILED = [
    *(case for case in SMALL_SCANS if case.name.endswith(SEEN) or case.name.startswith(SEEN)),
    ScanCase("few long sequences", ("w2", "v_flip"), (8, 9), 32, 16),
]


@each(
    "case dtype",
    {
        COMPUTE: [
            *((case, F32) for case in SMALL_SCANS),
            *((case, dtype) for case in BOTH_ORDERS for dtype in (BF16, F16)),
        ],
        CUDA: [
            *((case, DTYPES[i % 3]) for i, case in enumerate(SMALL_SCANS[1:]) if i % 3),
            (MANY, BF16),
            (FEW_LONG, BF16),
            (LONG, BF16),
            (WITH_64_STATES, F32),
        ],
        COMPILE: [(case, DTYPES[len(case.name) % 3]) for case in COMPILED],
    },
)
def test_scan(backend, case, dtype):
    check(backend, triton_or(backend), case, dtype)


def mixed_arguments(case, dtype, device):
    arguments = scan_arguments(case, dtype, device)
    dtypes = {"u": BF16, "B": F16, "z": BF16, "D": F16}
    mixed = {n: x.to(dtypes.get(n, x.dtype)) for n, x in arguments.tensors.items()}
    return arguments._replace(tensors=mixed)


@on(*COMPUTE)
def test_mixed_dtypes(backend):
    arguments = mixed_arguments(BOTH_ORDERS[0], F32, backend.device)
    arguments = arguments._replace(gradient=arguments.gradient.bfloat16())
    check_kernels("selective_scan", backend, arguments, BF16, triton_or(backend))


@on(*CUDA)
def test_mixed_dtypes_are_not_for_scan_cu(backend):
    case = replace(WARP_SCANS[0], options=("D", "z", "dt_bias", "softplus"))
    check_kernels("selective_scan", backend, mixed_arguments(case, F32, backend.device), BF16)


@each_layout
@each("case dtype", {COMPUTE: [(case, F32) for case in BOTH_ORDERS]})
def test_hostile_memory(backend, case, dtype, layout):
    check(backend, triton_or(backend), case, dtype, layout, expanded)
    small = ScanCase("small", ("h",), (2, 2))
    check(backend, triton_or(backend), small, dtype, gradient_layout=layout)


@on(*TRITON)
@pytest.mark.parametrize("case", BOTH_ORDERS, ids=str)
@pytest.mark.parametrize(("segments", "segment_chunks"), [(1, 3), (2, 2), (3, 1)])
def test_segments_of_time(backend, case, segments, segment_chunks, monkeypatch):
    """Many sequences walk their chunks in order; few long ones are cut into segments."""
    scan_launch = private("selective_scan", "scan_launch")

    def forced(*args):
        shape = scan_launch(*args)
        return shape._replace(segments=segments, segment_chunks=segment_chunks)

    patch(monkeypatch, "selective_scan", scan_launch=forced, CHUNK=8)  # of 24 steps
    check(backend, "triton", case, F32)


@each(
    "case dtype",
    {COMPUTE: [(SMALL_SCANS[0], F32)], CUDA: [(SMALL_SCANS[0], BF16), (WARP_SCANS[0], BF16)]},
)
def test_states_are_kept_on_demand_and_made_again_where_not(backend, case, dtype):
    dy, tensors, rest = scan_arguments(case, dtype, backend.device)
    host = kernels_of("selective_scan", backend.kernels)
    y, states = host.forward(**tensors, **rest, save=False)
    kept, all_states = host.forward(**tensors, **rest, save=True)
    assert states.numel() == 0
    assert all_states.numel() > 0
    assert torch.equal(y, kept)
    gradients = host.backward(dy, **tensors, **rest, states=states)
    expected = host.backward(dy, **tensors, **rest, states=all_states)
    for one, other in zip(gradients, expected, strict=True):
        assert one is other or torch.equal(one, other)


@on(*COMPUTE)
def test_index_of_another_integer_type_and_layout(backend):
    arguments = scan_arguments(BOTH_ORDERS[0], F32, backend.device)
    index = arguments.rest["index"].long().t().contiguous().t()
    arguments = arguments._replace(rest={**arguments.rest, "index": index})
    check_kernels("selective_scan", backend, arguments, F32)


@pytest.mark.filterwarnings("ignore:overflow encountered")
@on(*TRITON)
@each_dtype
def test_extreme_steps_and_decays_stay_finite(backend, dtype):
    check_extreme_scan(backend, dtype, triton_or(backend))


@on(*COMPUTE)
def test_no_images(backend):
    case = ScanCase("none", ("h",), (2, 2), images=0)
    arguments = scan_arguments(case, F32, backend.device)
    results = run_kernels("selective_scan", triton_or(backend), arguments)
    assert results["output"].shape == (0, 1, 4, 6)
    assert torch.equal(results["dA"].cpu(), torch.zeros(1, 6, 4))


@pytest.fixture(scope="module")
def emulator(tmp_path_factory) -> Emulator:
    return Emulator(tmp_path_factory.mktemp("scan"))


@pytest.fixture
def warps(backend, request, monkeypatch) -> Backend:
    """The backend, where `interpreter` runs scan.cu compiled by g++."""
    if backend.name == "interpreter":
        if shutil.which("g++") is None:
            pytest.skip("needs g++")
        launch = request.getfixturevalue("emulator").launch
        monkeypatch.setattr("localmamba.ops._common.nvrtc.launch", launch)
    return backend


LANES = {"one lane": 0, "two lanes": 1, "four lanes": 2, "segments": 1000}
"""How a pass is cut, and how many programs make a wave, in programs of the case."""


def cut(monkeypatch, case, lanes):
    if lanes is not None:  # else as the device has it
        programs = case.images * len(case.directions) * case.channels // 32
        warp_scan_wave(monkeypatch, LANES[lanes] * programs)


def numbered(cases):
    """The first case in every dtype, the others in one each: kernels take seconds to compile."""
    rest = [(case, DTYPES[i % 3]) for i, case in enumerate(cases)]
    return [(cases[0], dtype) for dtype in DTYPES[1:]] + rest


@each(
    "case dtype lanes",
    {
        TRITON: [
            (case, DTYPES[i % 3], lanes) for lanes in LANES for i, case in enumerate(WARP_SCANS)
        ],
        CUDA: [
            *((case, dtype, None) for case, dtype in numbered(WARP_SCANS + MORE_WARP_SCANS)),
            *(
                (case, dtype, lanes)
                for lanes in ("two lanes", "four lanes")
                for case, dtype in numbered(MORE_WARP_SCANS)
            ),
            *((case, dtype, None) for case in (MANY, SOME, FEW, FEW_LONG) for dtype in DTYPES),
            (LONG, BF16, None),
        ],
    },
)
def test_warps(warps, case, dtype, lanes, monkeypatch):
    cut(monkeypatch, case, lanes)
    check(warps, "cuda_cpp", case, dtype)


@each_layout
@each(
    "case dtype", {TRITON: [(WARP_SCANS[0], F32)], CUDA: [(case, BF16) for case in WARP_SCANS[:2]]}
)
def test_warps_on_hostile_memory(warps, case, dtype, layout):
    check(warps, "cuda_cpp", case, dtype, layout, expanded)
    check(warps, "cuda_cpp", case, dtype, gradient_layout=layout)


@on(*TRITON)
@pytest.mark.parametrize("lanes", LANES)
def test_large_steps_and_outputs_of_warps(warps, lanes, monkeypatch):
    """As after training with a large learning rate: outputs of a million and more."""
    case = WARP_SCANS[2]
    cut(monkeypatch, case, lanes)
    dy, tensors, _ = arguments = scan_arguments(case, F32, warps.device)
    tensors |= {"dt": 30 * tensors["dt"], "B": 100 * tensors["B"], "C": 100 * tensors["C"]}
    arguments = arguments._replace(gradient=1e-6 * dy, tensors=tensors)
    check_kernels("selective_scan", warps, arguments, F32, "cuda_cpp")


@on(*TRITON)
@each_dtype
def test_extreme_steps_and_decays_stay_finite_in_warps(warps, dtype):
    check_extreme_scan(warps, dtype, "cuda_cpp", channels=32, states=16)


@on(*CUDA)
@pytest.mark.parametrize("case", [MANY, WARP_SCANS[0]], ids=str)
def test_warps_serve_their_cases_of_their_own_accord(backend, case, monkeypatch):
    calls = []
    module = importlib.import_module("localmamba.ops.selective_scan.warp_scan")
    scan_forward = module.scan_forward
    monkeypatch.setattr(module, "scan_forward", lambda *a: calls.append(a) or scan_forward(*a))
    arguments = scan_arguments(case, BF16, backend.device)
    check_kernels("selective_scan", backend, arguments, BF16)
    assert calls


both = pytest.mark.parametrize("kernels", ["triton", "cuda_cpp"])


@on(*CUDA)
@both
@pytest.mark.parametrize("layout_case", WARP_SCANS[:2], ids=str)
@each_layout
def test_hostile_memory_in_half_precision(backend, kernels, layout_case, layout):
    check(backend, kernels, layout_case, BF16, layout, expanded)
    check(backend, kernels, layout_case, BF16, gradient_layout=layout)


@on(*CUDA)
@both
@pytest.mark.parametrize("case", [MANY, FEW_LONG], ids=str)
def test_two_runs_are_equal_bit_by_bit(backend, kernels, case):
    arguments = scan_arguments(case, BF16, backend.device)
    first, second = (run_kernels("selective_scan", kernels, arguments) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


@on(*CUDA)
@both
def test_on_another_stream(backend, kernels):
    """A kernel runs where PyTorch's current stream says."""
    arguments = scan_arguments(FEW_LONG, BF16, backend.device)
    expected = run_kernels("selective_scan", kernels, arguments)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = {name: x if x is None else x + 0 for name, x in arguments.tensors.items()}
        results = run_kernels("selective_scan", kernels, arguments._replace(tensors=late))
    torch.cuda.current_stream().wait_stream(stream)
    for name, x in results.items():
        assert torch.equal(x, expected[name]), name


@on(*TRITON)
@each_dtype
@pytest.mark.parametrize(("rank", "columns"), [(1, 8), (6, 8), (8, 8), (12, 16)])
def test_weights_of_branches_are_padded_with_zeros(backend, rank, columns, dtype):
    x_proj, dt_weight = (
        torch.randn(shape, device=backend.device) for shape in ((3, rank + 10, 20), (3, 20, rank))
    )
    x_out, dt_out = align_weights()(x_proj.mT.contiguous().mT, dt_weight, dtype)
    zeros = x_proj.new_zeros(3, columns - rank, 20)
    expected = torch.cat((x_proj[:, :rank], zeros, x_proj[:, rank:]), dim=1)
    # The interpreter cuts off where a GPU rounds.
    rounding = {"rtol": 2.0**-7 if dtype == BF16 else 2.0**-10, "atol": 1e-7}
    torch.testing.assert_close(x_out, expected.to(dtype), **rounding)
    torch.testing.assert_close(dt_out[..., :rank], dt_weight.to(dtype), **rounding)
    assert not dt_out[..., rank:].any()


@on(*COMPILE)
@pytest.mark.parametrize("rank", [1, 6, 48])
def test_what_goes_with_the_scan_in_branches_compiles(backend, rank):
    del backend
    x_proj, dt_weight = torch.empty(4, rank + 32, 96), torch.empty(4, 96, rank)
    align_weights()(x_proj, dt_weight, BF16)
    out = torch.empty(2, 4, 15, rank + 32, dtype=BF16)
    private("selective_scan", "sum_blocks")(torch.empty(4, 2, 3, 15, 32), out[..., rank:])


@on(*TRITON)
@pytest.mark.parametrize("rows", [1, 32, 45])
def test_sums_over_blocks_of_channels(backend, rows):
    x = torch.randn(3, 2, 5, rows, 32, device=backend.device)
    buffer = torch.full((2, rows, 3, 40), 7.0, device=backend.device)
    private("selective_scan", "sum_blocks")(x, buffer.transpose(1, 2)[..., 8:])
    assert torch.allclose(buffer.transpose(1, 2)[..., 8:], x.sum(2).transpose(0, 1), atol=1e-5)
    assert (buffer[..., :8] == 7).all()
