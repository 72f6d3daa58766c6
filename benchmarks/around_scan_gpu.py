"""Times the kernels around the scan on a GPU, beside the limit of memory bandwidth.

    python benchmarks/around_scan_gpu.py [--shapes vim vmamba1 ...] [--dtype bfloat16]

Token norms, SS2D's convolution, SCAttn and the sum over directions, forward and backward, for the
blocks of LocalVim-T (vim) and the stages of LocalVMamba-T. Medians of CUDA-event timings after
warm-up, with a flushed L2 cache. `floor` is the time to read inputs and write outputs once at the
bandwidth of a copy. The last line sums the blocks of a training step of LocalVMamba-T.
"""

import argparse
from collections.abc import Callable

import torch
import triton.testing
from scan_gpu import SHAPES
from torch import Tensor

from localmamba.ops import cuda as kernels
from localmamba.ops.combine import cuda as combine
from localmamba.ops.combine.reference import CombineInputs

DIRECTIONS = 4
EPS = 1e-5
BLOCKS = {"vmamba1": 2, "vmamba2": 2, "vmamba3": 9, "vmamba4": 2}
"""Number of blocks in each stage of LocalVMamba-T."""

Timed = dict[str, tuple[Callable[[], object], int]]
"""Functions to time, and the bytes that each must move."""


def median_ms(function: Callable[[], object]) -> float:
    """Returns the median time of a call in ms, after warm-up and with a flushed L2 cache."""
    return triton.testing.do_bench(function, return_mode="median")


def copy_rate() -> float:
    """Returns the bandwidth of a copy in bytes per ms, reads and writes."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / median_ms(lambda: y.copy_(x))


def size(*tensors: Tensor) -> int:
    """Returns the size in bytes."""
    return sum(x.numel() * x.element_size() for x in tensors)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def norms(batch: int, tokens: int, channels: int, centered: bool, dtype: torch.dtype) -> Timed:
    """Norm of the residual stream: LayerNorm with stochastic depth, or RMSNorm."""
    hidden, dnormed = (random(batch, tokens, channels, dtype=dtype) for _ in range(2))
    residual, dstream = (random(batch, tokens, channels) for _ in range(2))
    weight, bias = random(channels), random(channels) if centered else None
    settings = (weight, bias, None, None, random(batch) if centered else None, EPS, dtype)

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
    """SS2D's convolution; x is one half of the output of the projection."""
    x = random(batch, height, width, 2 * channels, dtype=dtype)[..., :channels]
    dy = random(batch, height, width, channels, dtype=dtype)
    weight, bias = random(channels, 1, 3, 3), random(channels)
    return {
        "conv": (lambda: kernels.depthwise_forward(x, weight, bias), 2 * size(dy)),
        # Two kernels: backward of SiLU, then of the convolution.
        "conv backward": (lambda: kernels.depthwise_backward(dy, x, weight, bias), 5 * size(dy)),
    }


def joins(batch: int, tokens: int, channels: int, gate_first: bool, dtype: torch.dtype) -> Timed:
    """SCAttn's pooling and weighted sum; LocalVim gates the former, LocalVMamba norms and gates."""
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
    if not gate_first:  # without norm and gate, the sum's gradient is given
        timed["sum backward"] = (
            lambda: combine._sum_backward(dsum, inputs),
            outputs + 2 * size(dsum) + 2 * gates,
        )
    return timed


def measure(name: str, dtype: torch.dtype, rate: float) -> dict[str, tuple[float, float]]:
    """Measures time and floor of every kernel at a shape, in ms."""
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
