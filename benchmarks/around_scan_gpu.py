"""Times the kernels around the scan on a GPU, one by one, beside what memory allows.

    python benchmarks/around_scan_gpu.py [--shapes vim vmamba1 ...] [--dtype bfloat16]

Norms of tokens, SS2D's convolution, SCAttn and the sum over directions, forward and backward, for
the blocks of LocalVim-T (vim) and LocalVMamba-T's stages. Medians of CUDA-event timings after
warm-up, with an empty L2 cache. `floor` counts what a kernel must read and write once, at the rate
that a copy reaches here. The last line adds up the blocks of a training step of LocalVMamba-T.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
import triton
from scan_gpu import SHAPES
from torch import Tensor

from localmamba.ops import cuda as kernels
from localmamba.ops.combine import cuda as combine
from localmamba.ops.combine.reference import CombineInputs

DIRECTIONS = 4
EPS = 1e-5
L2_BYTES = 1 << 28
"""Written between two runs: more than any GPU's L2 cache."""

BLOCKS = {"vmamba1": 2, "vmamba2": 2, "vmamba3": 9, "vmamba4": 2}
"""Of LocalVMamba-T, by stage."""

Timed = dict[str, tuple[Callable[[], object], int]]
"""What is timed, and the bytes that it must move."""


def median_ms(function: Callable[[], object], repeats: int = 20) -> float:
    """Median time of a call in ms, after warm-up; the L2 cache holds none of its inputs."""
    for _ in range(3):
        function()
    flush = torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda")
    pairs = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        function()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def copy_rate() -> float:
    """Bytes that a copy moves in a ms, read and written."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / median_ms(lambda: y.copy_(x))


def size(*tensors: Tensor) -> int:
    """Bytes."""
    return sum(x.numel() * x.element_size() for x in tensors)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def norms(batch: int, tokens: int, channels: int, centred: bool, dtype: torch.dtype) -> Timed:
    """Of the stream before a block: LayerNorm with stochastic depth, or RMSNorm."""
    hidden, dnormed = (random(batch, tokens, channels, dtype=dtype) for _ in range(2))
    residual, dstream = (random(batch, tokens, channels) for _ in range(2))
    weight, bias = random(channels), random(channels) if centred else None
    settings = (weight, bias, None, None, random(batch) if centred else None, EPS, dtype)

    def forward():
        return kernels.norm_forward(hidden, residual, *settings, True)

    stream = forward()[1]
    return {
        "norm": (forward, size(hidden, hidden, residual, stream)),
        "norm backward": (
            lambda: kernels.norm_backward(dnormed, dstream, stream, *settings, True),
            size(dnormed, dnormed, dstream, stream, stream),
        ),
    }


def convolutions(batch: int, height: int, width: int, channels: int, dtype: torch.dtype) -> Timed:
    """SS2D's: x is half of what the projection before it makes."""
    x = random(batch, height, width, 2 * channels, dtype=dtype)[..., :channels]
    dy = random(batch, height, width, channels, dtype=dtype)
    weight, bias = random(channels, 1, 3, 3), random(channels)
    return {
        "conv": (lambda: kernels.depthwise_forward(x, weight, bias), 2 * size(dy)),
        # Two kernels: back through SiLU, then through the convolution.
        "conv backward": (lambda: kernels.depthwise_backward(dy, x, weight, bias), 5 * size(dy)),
    }


def joins(batch: int, tokens: int, channels: int, gate_first: bool, dtype: torch.dtype) -> Timed:
    """SCAttn's pooling and the sum: LocalVim's gate in the former, LocalVMamba's after a norm."""
    y = random(batch, DIRECTIONS, tokens, channels, dtype=dtype)
    z, dsum = (random(batch, tokens, channels, dtype=dtype) for _ in range(2))
    weights, dmeans = (random(batch, DIRECTIONS, channels) for _ in range(2))
    first, last = (z, None) if gate_first else (None, z)
    norm = (None, None) if gate_first else (random(channels), random(channels))
    gates, outputs = (0 if gate_first else size(z)), size(y)
    inputs = CombineInputs(y, weights, None, last, *norm, EPS)
    timed: Timed = {
        "pool": (lambda: combine.pool_forward(y, first, EPS), outputs + size(z) - gates),
        "combine": (lambda: combine.combine_forward(inputs), outputs + size(z) + gates),
        "channel weights": (
            lambda: combine._channel_weights_backward(dsum, y, None),
            outputs + size(dsum),
        ),
        "y backward": (
            lambda: combine._y_backward(y, dsum, weights, None, dmeans, first, None, EPS),
            2 * outputs + size(dsum) + 2 * (size(z) - gates),
        ),
    }
    if not gate_first:  # with neither norm nor gate after it, the sum's gradient is there
        timed["sum backward"] = (
            lambda: combine._sum_backward(dsum, inputs),
            outputs + 2 * size(dsum) + 2 * gates,
        )
    return timed


def measure(name: str, dtype: torch.dtype, rate: float) -> dict[str, tuple[float, float]]:
    """Time and floor in ms of every kernel at a shape."""
    batch, channels, height, width, grid_order = SHAPES[name]
    tokens = height * width
    timed = norms(batch, tokens, channels // 2, grid_order, dtype)
    if grid_order:
        timed |= convolutions(batch, height, width, channels, dtype)
    timed |= joins(batch, tokens, channels, not grid_order, dtype)
    return {key: (median_ms(run), moved / rate) for key, (run, moved) in timed.items()}


def show(name: str, times: dict[str, tuple[float, float]]) -> None:
    row = "  ".join(f"{key} {ms:.3f} (floor {floor:.3f})" for key, (ms, floor) in times.items())
    print(f"{name:8s} {row}", flush=True)


def main() -> None:
    shapes = [name for name in SHAPES if name != "long"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=shapes, choices=shapes)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU: it times kernels there")
    rate = copy_rate()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    found = {}
    for name in options.shapes:
        found[name] = measure(name, getattr(torch, options.dtype), rate)
        show(name, found[name])
    if set(found) >= set(BLOCKS):
        total = {
            key: tuple(sum(n * found[name][key][i] for name, n in BLOCKS.items()) for i in (0, 1))
            for key in found["vmamba1"]
        }
        show("step", total)


if __name__ == "__main__":
    main()
