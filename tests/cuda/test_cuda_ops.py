"""The public ops on a GPU: gradients, PyTorch's contract, compilation, autocast, determinism."""

from collections.abc import Iterator

import pytest
import torch
from kernel_cases import (
    COMBINE_OPTIONS,
    DTYPES,
    combine_arguments,
    conv_arguments,
    depthwise_arguments,
    expanded,
    pool_arguments,
)
from norm_cases import norm_arguments
from ops.helpers import (
    FORWARD_TOLERANCE,
    GRADIENT_TOLERANCE,
    LAYOUTS,
    assert_matches_reference,
    random,
    relative_error,
)
from scan_cases import (
    NO_GATE,
    ScanCase,
    scan_arguments,
)
from torch import Tensor

from localmamba.layers import SS2D, LocalVimMixer, S6Branches
from localmamba.ops import scan_index, scattn_combine, selective_scan
from localmamba.ops.selective_scan.reference import selective_scan_reference

DIRECTIONS = ("h", "v_flip", "w2", "w7_flip")
GRID = (9, 11)
CASES = {
    "CUDA C++": ScanCase("", DIRECTIONS, GRID, 64, 16, "scan", NO_GATE, 2),
    "Triton": ScanCase("", DIRECTIONS, GRID, 40, 4, images=2),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@each_case
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.usefixtures("poisoned_memory")
def test_scan_of_hostile_memory(case, layout):
    dy, tensors, rest = scan_arguments(case, torch.float32, "cuda", layout, expanded)
    inputs = {**tensors, "index": rest["index"], "length": rest["length"]}
    assert_matches_reference(selective_scan, selective_scan_reference, inputs, dy=dy)


def scattn_arguments(dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of `scattn_combine` by name: 2 images, 3 directions, 49 tokens, 96 channels."""
    shapes = {
        "y": (2, 3, 49, 96), "z": (2, 49, 96), "pool_weight": (96,), "pool_bias": (96,),
        "reduce_weight": (12, 96), "reduce_bias": (12,), "select_weight": (96, 12),
        "select_bias": (96,), "norm_weight": (96,), "norm_bias": (96,),
    }  # fmt: skip
    dtypes = {"y": dtype, "z": dtype}
    return {
        name: random(*shape, seed=seed, dtype=dtypes.get(name, torch.float32)).cuda()
        for seed, (name, shape) in enumerate(shapes.items())
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.usefixtures("poisoned_memory")
def test_scattn_against_float64(gate_first, dtype):
    """Under autocast too: its linear layers stay in float32."""
    inputs = {**scattn_arguments(dtype), "gate_first": gate_first}
    dy = random(2, 49, 96, seed=20).cuda()
    half = dtype if dtype != torch.float32 else torch.bfloat16

    def attend(**inputs: Tensor) -> Tensor:
        with torch.autocast("cuda", half, enabled=inputs["y"].dtype == half):
            return scattn_combine(**inputs)

    assert_matches_reference(attend, scattn_combine, inputs, dtype, dy)


def op_calls() -> Iterator[tuple[str, tuple]]:
    """Each op with arguments that need a gradient."""
    for name, case in CASES.items():
        _, tensors, rest = scan_arguments(case, torch.float32, "cuda")
        yield f"selective_scan {name}", (*tensors.values(), *rest.values(), True)
    _, tensors, rest = conv_arguments(DIRECTIONS, GRID, 40, 4, torch.float32, "cuda")
    yield "causal_conv", (*tensors.values(), *rest.values())
    for images in (2, 64):  # one and several rows of a map in a program's units
        _, tensors, _ = depthwise_arguments((9, 11), 192, 3, torch.float32, "cuda", images=images)
        yield f"depthwise_conv {images}", tuple(tensors.values())
    _, tensors, rest = pool_arguments(49, 96, True, torch.float32, "cuda")
    yield "pool_directions", (*tensors.values(), *rest.values())
    _, tensors, rest = combine_arguments(49, 96, COMBINE_OPTIONS, torch.float32, "cuda")
    yield "combine_directions", (*tensors.values(), *rest.values())
    tensors = norm_arguments((2, 49, 96), ("residual", "rotary"), torch.float32, "cuda")
    *tensors, _, _ = tensors.values()
    yield "residual_norm", (*tensors, 1e-5, torch.float32)
    yield "token_norm", (tensors[0], tensors[2], None, 1e-5, torch.float32)
    for gate_first in (False, True):
        tensors = scattn_arguments(torch.float32)
        yield f"scattn_combine {gate_first}", (*tensors.values(), gate_first, 1e-5, 1e-5)
    for conv_width in (0, 4):
        branches = S6Branches(4, 64, 16, 6, conv_width).cuda()
        index = scan_index(branches.D, list(DIRECTIONS), *GRID)
        yield (
            f"s6_branches with {conv_width} taps",
            (
                random(2, 99, 64).cuda(), branches.conv_weight, branches.conv_bias,
                branches.x_proj, branches.dt_weight, branches.dt_bias,
                -branches.A_log.detach().exp(), branches.D, index, True,
            ),
        )  # fmt: skip


def needing_gradients(arguments: tuple) -> list:
    """The arguments as leaves; tables of angles and indices have no gradient."""
    leaves = []
    for x in arguments:
        floating = isinstance(x, Tensor) and x.is_floating_point() and x.shape[0] != 1
        leaves.append(x.detach().requires_grad_() if floating else x)
    return leaves


def test_ops_keep_pytorchs_contract():
    for name, arguments in op_calls():
        op = getattr(torch.ops.localmamba, name.split()[0])
        torch.library.opcheck(op, needing_gradients(arguments))


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Operations that are not deterministic raise; scratch memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_two_runs_are_equal_bit_by_bit():
    for name, arguments in op_calls():
        if name.startswith("s6_branches"):
            continue  # its matrix products are deterministic with a setting of cuBLAS alone
        op = getattr(torch.ops.localmamba, name.split()[0])
        runs = []
        for _ in range(2):
            leaves = needing_gradients(arguments)
            outputs = op(*leaves)
            output = outputs if isinstance(outputs, Tensor) else outputs[0]
            wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
            runs.append([output, *torch.autograd.grad(output.square().sum(), wanted)])
        for one, other in zip(*runs, strict=True):
            assert torch.equal(one, other), name


def run_branches(branches: S6Branches, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Output, and gradients by name, of S6 branches along `DIRECTIONS`."""
    x = x.detach().requires_grad_()
    y = branches(x, scan_index(x, list(DIRECTIONS), *GRID))
    names, parameters = zip(*branches.named_parameters(), strict=True)
    gradients = torch.autograd.grad(y, (x, *parameters), dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(("x", *names), gradients, strict=True))}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("conv_width", [0, 4], ids=["plain", "convolution"])
@pytest.mark.parametrize("d_state", [4, 16], ids=["Triton", "CUDA C++"])
@pytest.mark.usefixtures("poisoned_memory")
def test_branches_against_float64(d_state, conv_width, dtype):
    """In half precision u, dt, B and C are rounded on the way: four times a kernel's tolerance."""
    torch.manual_seed(0)
    branches = S6Branches(4, 64, d_state, 6, conv_width).cuda()
    x, dy = random(2, 99, 64, seed=1).cuda(), random(2, 4, 99, 64, seed=2).cuda()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        results = run_branches(branches, x, dy)
    truths = run_branches(branches.double(), x.double(), dy.double())
    assert results["y"].dtype == dtype
    scale = 1 if dtype == torch.float32 else 4
    far = {}
    for name, x in results.items():
        tolerance = (FORWARD_TOLERANCE if name == "y" else GRADIENT_TOLERANCE)[dtype]
        error = relative_error(x, truths[name])
        if not error <= scale * tolerance:
            far[name] = error
    assert not far, far


@pytest.mark.parametrize(
    ("mixer_class", "dtype"), [(LocalVimMixer, torch.bfloat16), (SS2D, torch.float16)], ids=str
)
def test_mixers_compile_whole(mixer_class, dtype):
    """Without a graph break, forward and backward, under autocast; the same result."""
    torch.manual_seed(0)
    mixer = mixer_class(32, list(DIRECTIONS)).cuda()
    tokens = random(2, 99, 32).cuda()
    inputs = (tokens, *GRID) if mixer_class is LocalVimMixer else (tokens.unflatten(1, GRID),)

    def run(module) -> list[Tensor]:
        with torch.autocast("cuda", dtype):
            y = module(*inputs)
        return [y, *torch.autograd.grad(y.float().square().sum(), list(mixer.parameters()))]

    compiled = run(torch.compile(mixer, fullgraph=True))
    for one, other in zip(compiled, run(mixer), strict=True):
        assert relative_error(one, other) < 4 * GRADIENT_TOLERANCE[dtype]
