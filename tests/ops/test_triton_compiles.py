"""The Triton kernels compile for a GPU, on machines without one too; nothing runs.

What they compute is tested in the interpreter, which lets pass what the compiler refuses.
"""

from itertools import chain, combinations
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import (
    DTYPES,
    MERGE_OPTIONS,
    conv_arguments,
    depthwise_arguments,
    merge_arguments,
    pool_arguments,
    run_kernels,
    run_scattn_backward,
    run_weights,
    weights_arguments,
)
from norm_cases import (
    NORM_OPTIONS,
    norm_arguments,
    run_norm,
    run_norm_alone,
)
from scan_cases import (
    SMALL_SCANS,
    ScanCase,
    scan_arguments,
    scan_gradient,
)

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from localmamba.ops._common.partials import sum_partials
from localmamba.ops.selective_scan import cuda as kernels
from localmamba.ops.selective_scan.scan_sums import sum_blocks

NO_DEVICE = -1
"""The number of no device: what is compiled here is found by no launch."""

SEEN = ("padding", "no index", "1 state", "33 channels", "64 states", "one channel", "nothing")
SCANS = [
    *(case for case in SMALL_SCANS if case.name.endswith(SEEN) or case.name.startswith(SEEN)),
    ScanCase("few long sequences", ("w2", "v_flip"), (8, 9), 32, 16),
]


@pytest.fixture(autouse=True)
def compile_only(monkeypatch):
    """Launching a kernel compiles it, for an H100 that need not be there."""
    pretended = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: NO_DEVICE,
        get_current_stream=lambda device: device,
    )
    run = JITFunction.run

    def compile_kernel(self, *args, **kwargs):
        return run(self, *args, **{**kwargs, "warmup": True})

    monkeypatch.setattr(driver, "_active", pretended)
    monkeypatch.setattr(JITFunction, "run", compile_kernel)


def subsets(options):
    found = chain.from_iterable(combinations(options, n) for n in range(len(options) + 1))
    return pytest.mark.parametrize("options", list(found), ids=lambda chosen: "+".join(chosen))


@pytest.mark.parametrize("case", SCANS, ids=str)
def test_scan(case):
    dtype = DTYPES[len(case.name) % 3]
    tensors, rest = scan_arguments(case, dtype)
    run_kernels("selective_scan", "triton", scan_gradient(case, dtype), tensors, rest)


@pytest.mark.parametrize(("channels", "taps"), [(1, 4), (40, 3), (384, 4)])
def test_convolution(channels, taps):
    arguments = conv_arguments(("h", "w2"), (3, 5), channels, taps, torch.bfloat16)
    run_kernels("causal_conv", "cuda", *arguments)


@pytest.mark.parametrize("rank", [1, 6, 48])
def test_what_goes_with_the_scan_in_branches(rank):
    x_proj, dt_weight = torch.empty(4, rank + 32, 96), torch.empty(4, 96, rank)
    kernels.align_weights(x_proj, dt_weight, torch.bfloat16)
    out = torch.empty(2, 4, 15, rank + 32, dtype=torch.bfloat16)
    sum_blocks(torch.empty(4, 2, 3, 15, 32), out[..., rank:])


@pytest.mark.parametrize(
    ("images", "grid", "channels", "size", "bias", "dtype"),
    [
        (1, (1, 1), 1, 3, True, torch.float32),
        (1, (7, 9), 40, 5, False, torch.float16),
        (1200, (1, 1), 1, 3, True, torch.bfloat16),
        (600, (7, 9), 40, 3, False, torch.float32),
        (600, (8, 9), 192, 3, True, torch.bfloat16),
    ],
    ids=str,
)
def test_depthwise_convolution(images, grid, channels, size, bias, dtype):
    """With many images, a unit has several rows of a map."""
    arguments = depthwise_arguments(grid, channels, size, dtype, bias=bias, images=images)
    run_kernels("depthwise_conv", "cuda", *arguments)


@pytest.mark.parametrize("channels", [1, 96, 3072])
@pytest.mark.parametrize("gated", [False, True])
def test_pooling(gated, channels):
    gradient, tensors, rest = pool_arguments(15, channels, gated, torch.bfloat16)
    run_kernels("pool_directions", "cuda", gradient, tensors, rest)


@pytest.mark.parametrize("channels", [1, 96, 3072])
@pytest.mark.parametrize("gate_first", [False, True])
def test_both_gradients_of_scattn(gate_first, channels):
    run_scattn_backward("cuda", 15, channels, gate_first, not gate_first, torch.bfloat16)


@pytest.mark.parametrize(
    ("rows", "channels", "width"),
    [((1, 1), 1, 1), ((16, 4), 96, 12), ((128, 4), 384, 48), ((128, 4), 1536, 192)],
    ids=str,
)
def test_linear_layers_of_scattn(rows, channels, width):
    run_weights("cuda", *weights_arguments(rows, channels, width))


@pytest.mark.parametrize(
    ("shape", "axes", "dtype"),
    [
        ((1000, 2, 192), 0, torch.float32),
        ((9, 4, 7, 40), (0, 2), torch.float32),
        ((4, 16, 5000), 0, torch.bfloat16),
    ],
    ids=str,
)
def test_sums_of_partials(shape, axes, dtype):
    sum_partials(torch.zeros(shape, dtype=dtype), axes, dtype)


@subsets(MERGE_OPTIONS)
def test_merging(options):
    run_kernels("combine_directions", "cuda", *merge_arguments(15, 96, options, torch.bfloat16))


@pytest.mark.parametrize("channels", [1, 3072])
def test_merging_of_other_sizes(channels):
    run_kernels(
        "combine_directions", "cuda", *merge_arguments(15, channels, MERGE_OPTIONS, torch.float16)
    )


@subsets(NORM_OPTIONS)
def test_residual_norm(options):
    run_norm("cuda", norm_arguments((2, 15, 96), options, torch.bfloat16), torch.bfloat16)


@pytest.mark.parametrize("channels", [2, 100, 768, 1536])
def test_residual_norm_of_other_sizes(channels):
    tensors = norm_arguments((2, 15, channels), NORM_OPTIONS, torch.float32)
    run_norm("cuda", tensors, torch.float32)


@pytest.mark.parametrize("options", [(), ("bias",)], ids=["rms", "layer"])
def test_norm_alone(options):
    run_norm_alone("cuda", norm_arguments((2, 15, 96), options, torch.bfloat16), torch.bfloat16)
