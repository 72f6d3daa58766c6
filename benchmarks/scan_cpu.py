"""Times the selective scan on a CPU: the Numba kernels beside the plain PyTorch reference.

    python benchmarks/scan_cpu.py [--shapes vim vmamba1 ...] [--threads 2] [--repeats 30]

Medians of wall-clock times in ms after warm-up, and their ratio. The backward pass of the reference
is autograd through its forward pass.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from localmamba.benchmark import describe_machine
from localmamba.ops import scan_index, selective_scan
from localmamba.ops.selective_scan.reference import selective_scan_reference

SHAPES = {
    # name: (batch, inner channels, height, width, inputs in grid order)
    "vim": (1, 384, 14, 14, False),
    "vim-8": (8, 384, 14, 14, False),
    "vmamba1": (1, 192, 56, 56, True),
    "vmamba2": (1, 384, 28, 28, True),
    "vmamba3": (1, 768, 14, 14, True),
    "vmamba4": (1, 1536, 7, 7, True),
}
DIRECTIONS = ["h", "h_flip", "w2", "w2_flip"]
STATES = 16


def scan_inputs(shape: str) -> dict[str, Tensor]:
    """Returns the arguments of `selective_scan` for a shape, with initial step sizes."""
    batch, channels, height, width, grid_order = SHAPES[shape]
    torch.manual_seed(0)
    index = scan_index(torch.empty(0), DIRECTIONS, height, width)
    directions, steps = index.shape
    rows = (batch, directions, height * width if grid_order else steps)
    u = (batch, rows[2], channels) if grid_order else (*rows, channels)
    rates = torch.arange(1, STATES + 1, dtype=torch.float32)
    inputs = {
        "u": torch.randn(u),
        "dt": torch.randn(*rows, channels),
        "A": -rates.expand(directions, channels, STATES).clone(),
        "B": torch.randn(*rows, STATES),
        "C": torch.randn(*rows, STATES),
        "D": torch.ones(directions, channels),
        "dt_bias": torch.randn(directions, channels) - 4,
    }
    return {name: x.requires_grad_() for name, x in inputs.items()} | {"index": index}


def median_ms(function: Callable[[], object], repeats: int) -> float:
    """Returns the median time of a call in ms, after one call that may compile."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def forward_and_backward_ms(
    scan: Callable[..., Tensor], inputs: dict[str, Tensor], repeats: int
) -> tuple[float, float]:
    """Times a forward pass without gradients, and a backward pass alone."""
    with torch.no_grad():
        forward = median_ms(lambda: scan(**inputs), repeats)
    y = scan(**inputs)
    dy = torch.randn_like(y)
    leaves = [x for x in inputs.values() if x.requires_grad]
    backward = median_ms(lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True), repeats)
    return forward, backward


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=30, help="timed calls of the kernels")
    parser.add_argument("--reference-repeats", type=int, default=5, help="of the reference")
    options = parser.parse_args()
    if options.threads < 1:
        parser.error(f"threads must be at least 1, got {options.threads}")
    torch.set_num_threads(options.threads)
    machine = ", ".join(f"{key} {value}" for key, value in describe_machine("cpu").items())
    print(f"{machine}, Python {platform.python_version()}")
    print(f"float32, K {len(DIRECTIONS)}, N {STATES}")
    print(f"{'shape':8s} {'B x L x D':>14s}  {'pass':8s} {'kernel':>9s} {'reference':>10s}  ratio")
    for name in options.shapes:
        batch, channels, height, width, _ = SHAPES[name]
        inputs = scan_inputs(name)
        ours = forward_and_backward_ms(selective_scan, inputs, options.repeats)
        theirs = forward_and_backward_ms(
            selective_scan_reference, inputs, options.reference_repeats
        )
        size = f"{batch} x {height * width} x {channels}"
        for which, one, other in zip(("forward", "backward"), ours, theirs, strict=True):
            print(
                f"{name:8s} {size:>14s}  {which:8s} {one:9.2f} {other:10.1f} {other / one:6.1f}x",
                flush=True,
            )


if __name__ == "__main__":
    main()
