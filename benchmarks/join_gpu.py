"""Times SCAttn's pooling and the sum over directions on a GPU, beside what memory allows.

    python benchmarks/join_gpu.py [--shapes vim vmamba1 ...] [--dtype bfloat16]

Medians of CUDA-event timings after warm-up. `floor` counts each pass over [B, K, L, D] and
[B, L, D] that the maths needs, at the rate that a copy reaches here.
"""

import argparse

import torch
import triton
from scan_gpu import SHAPES, median_ms
from torch import Tensor

from localmamba.ops.backends import backend

DIRECTIONS = 4
EPS = 1e-5


def copy_rate() -> float:
    """Bytes that a copy moves in a ms, read and written."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / median_ms(lambda: y.copy_(x))


def join_inputs(name: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """y, z, the norm's weight and bias, and a gradient."""
    batch, channels, height, width, _ = SHAPES[name]
    length = height * width
    y = torch.randn(batch, DIRECTIONS, length, channels, device="cuda", dtype=dtype)
    z = torch.randn(batch, length, 2 * channels, device="cuda", dtype=dtype)[..., channels:]
    norm = torch.rand(2, channels, device="cuda")
    return y, z, *norm, torch.randn(batch, length, channels, device="cuda", dtype=dtype)


def linear_layers(channels: int) -> list[Tensor]:
    """SCAttn's parameters."""
    width = channels // 8
    shapes = [(channels,), (channels,), (width, channels), (width,), (channels, width), (channels,)]
    return [torch.rand(shape, device="cuda") - 0.5 for shape in shapes]


def measure(name: str, dtype: torch.dtype, rate: float) -> dict[str, tuple[float, float]]:
    """Time and floor in ms of each pass: LocalVim's gate before SCAttn, LocalVMamba's norm."""
    y, z, weight, bias, dout = join_inputs(name, dtype)
    kernels = backend(y)
    outputs, tokens = (x.numel() * x.element_size() / rate for x in (y, dout))
    gate_first = not SHAPES[name][4]
    gate, norm = (z, (None, None)) if gate_first else (None, (weight, bias))

    means, parameters = kernels.pool_forward(y, gate, EPS), linear_layers(y.shape[-1])
    weights, reduced = kernels.select_forward(means, *parameters)

    def backward():
        kernels.attend_backward(
            dout, y, means, weights, reduced, parameters, z, *norm, gate_first, EPS, EPS
        )

    return {
        "pool": (
            median_ms(lambda: kernels.pool_forward(y, gate, EPS)),
            outputs + tokens * gate_first,
        ),
        "select": (median_ms(lambda: kernels.select_forward(means, *parameters)), 0.0),
        "merge": (
            median_ms(lambda: kernels.merge_forward(y, weights, None, z, *norm, EPS)),
            outputs + 2 * tokens,
        ),
        # Twice y, once dy; dout, z, dz and the sum's gradient twice; with a gate first z, dz again.
        "backward": (median_ms(backward), 3 * outputs + (5 + 3 * gate_first) * tokens),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    options = parser.parse_args()
    rate = copy_rate()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    for name in options.shapes:
        times = measure(name, getattr(torch, options.dtype), rate)
        row = "  ".join(f"{key} {ms:.3f} (floor {floor:.3f})" for key, (ms, floor) in times.items())
        print(f"{name:9s} {options.dtype}  {row}", flush=True)


if __name__ == "__main__":
    main()
