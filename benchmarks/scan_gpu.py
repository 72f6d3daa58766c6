"""Times the forward and backward kernels of the selective scan on a GPU.

    python benchmarks/scan_gpu.py [--shapes vim vmamba1 ...] [--dtype bfloat16]

Medians of CUDA-event timings after warm-up. `floor` is the limit of the special-function units for
one exponential per state and step in the forward pass and two in the backward pass (the kernel
computes three: docs/performance.md).
"""

import argparse
import statistics

import torch
import triton

from localmamba.ops.scan_orders import CANDIDATES, scan_index
from localmamba.ops.selective_scan import cuda as kernels
from localmamba.ops.selective_scan.reference import ScanInputs

SHAPES = {
    # name: (batch, inner channels, height, width, inputs in grid order)
    "vim": (128, 384, 14, 14, False),
    "vmamba1": (128, 192, 56, 56, True),
    "vmamba2": (128, 384, 28, 28, True),
    "vmamba3": (128, 768, 14, 14, True),
    "vmamba4": (128, 1536, 7, 7, True),
    "long": (1, 192, 200, 320, True),
}
DIRECTIONS = ["h", "v_flip", CANDIDATES[4], "w7_flip"]


def median_ms(function, repeats: int = 9, calls: int = 5) -> float:
    """Returns the median time of a call in ms, by CUDA events around `calls` calls."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


def scan_inputs(name: str, dtype: torch.dtype, states: int = 16):
    """Returns the inputs of `scan_forward` for a shape, with typical step sizes and K = 4."""
    batch, channels, height, width, grid_order = SHAPES[name]
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.float32).to(dtype)

    length = height * width
    index = scan_index(torch.empty(0, device="cuda"), DIRECTIONS, height, width)
    directions, rows = index.shape[0], length if grid_order else index.shape[1]
    u_shape = (batch, length, channels) if grid_order else (batch, directions, rows, channels)
    bc = normal(batch, directions, rows, 2 * states)
    decay = torch.arange(1, states + 1, device="cuda", dtype=torch.float32)
    return ScanInputs(
        normal(*u_shape),
        normal(batch, directions, rows, channels),
        -decay.expand(directions, channels, states).contiguous(),
        bc[..., :states],
        bc[..., states:],
        normal(directions, channels, dtype=torch.float32),
        None,
        normal(directions, channels, dtype=torch.float32) - 4,
        index,
        length,
        True,
    )


def measure(name: str, dtype: torch.dtype) -> dict[str, float]:
    """Measures forward (with saved states) and backward time of a shape, and its floor, in ms."""
    inputs = scan_inputs(name, dtype)
    y, states = kernels.scan_forward(inputs, True)
    dy = torch.randn_like(y)
    properties = torch.cuda.get_device_properties(0)
    exponentials = y.numel() * inputs.A.shape[2]
    clock = getattr(properties, "clock_rate", 1_755_000) * 1e3
    floor = exponentials / (16 * properties.multi_processor_count * clock) * 1e3
    return {
        "forward": median_ms(lambda: kernels.scan_forward(inputs, True)),
        "forward, no states": median_ms(lambda: kernels.scan_forward(inputs, False)),
        "backward": median_ms(lambda: kernels.scan_backward(dy, inputs, states)),
        "floor forward": floor,
        "floor backward": 2 * floor,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU: it times kernels there")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    for name in options.shapes:
        times = measure(name, getattr(torch, options.dtype))
        row = "  ".join(f"{key} {value:.3f}" for key, value in times.items())
        print(f"{name:9s} {options.dtype}  {row}", flush=True)


if __name__ == "__main__":
    main()
