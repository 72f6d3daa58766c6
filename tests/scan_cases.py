"""Shapes of the scan, their tensors, and steps and decays at the extremes."""

from dataclasses import dataclass

import torch
from kernel_cases import Arguments, Layout, check_kernels, run_kernels
from ops.backends import Backend
from ops.helpers import random, scan_inputs

from localmamba.ops.scan_orders import index_table

OPTIONS = ("D", "z", "dt_bias", "softplus")


@dataclass(frozen=True)
class ScanCase:
    """A shape of the scan, and which of its options are on.

    Attributes:
        name: Shown by pytest.
        directions: Names of K scan directions.
        grid: (H, W).
        channels: D.
        states: N.
        order: Of the inputs: `grid`, `scan`, or `none` for no index.
        options: Those of `OPTIONS` that are on.
        images: B.
        class_token: Where a class token stands among the tokens, -1 for none.
    """

    name: str
    directions: tuple[str, ...]
    grid: tuple[int, int]
    channels: int = 6
    states: int = 4
    order: str = "grid"
    options: tuple[str, ...] = OPTIONS
    images: int = 1
    class_token: int = -1

    @property
    def length(self) -> int:
        """Tokens L."""
        return self.grid[0] * self.grid[1] + (self.class_token >= 0)

    def __str__(self) -> str:
        return self.name


NO_GATE = ("D", "dt_bias", "softplus")

SMALL_SCANS = (
    ScanCase("grid order, padding", ("h", "w2_flip"), (3, 5)),
    ScanCase("scan order, padding", ("v", "w2"), (3, 5), order="scan"),
    ScanCase("grid order, no padding", ("h_flip", "v"), (4, 2), channels=5, images=2),
    ScanCase("scan order, no padding", ("v_flip", "h"), (2, 4), channels=5, order="scan"),
    ScanCase("scan order, windows of 7", ("w7_flip",), (3, 4), order="scan"),
    ScanCase("no index", ("h", "v"), (3, 3), order="none"),
    ScanCase("class token", ("w2", "v_flip"), (3, 3), class_token=4),
    ScanCase("one token", ("h", "w2"), (1, 1)),
    ScanCase("1 state", ("h",), (3, 5), states=1),
    ScanCase("5 states", ("w2",), (3, 3), states=5),
    ScanCase("16 states, 33 channels", ("w2_flip",), (3, 3), states=16, channels=33),
    ScanCase("64 states", ("v",), (2, 5), states=64, channels=32),
    ScanCase("one channel", ("v_flip",), (3, 2), channels=1),
    ScanCase("nothing but the scan", ("h", "w2"), (3, 3), options=()),
    ScanCase("softplus alone", ("w2", "v"), (3, 3), order="scan", options=("softplus",)),
    ScanCase("no gate", ("w2_flip",), (3, 3), options=NO_GATE),
    ScanCase("bias without softplus", ("w2",), (3, 3), options=("dt_bias", "z")),
)


def scan_arguments(
    case: ScanCase,
    dtype: torch.dtype,
    device: str = "cpu",
    layout: Layout = torch.clone,
    gradient_layout: Layout = torch.clone,
) -> Arguments:
    """The scan's arguments; parameters are float32."""
    index = torch.from_numpy(index_table(case.directions, case.grid, case.class_token).copy())
    steps = index if case.order != "none" else index[:, : case.length]
    tensors = scan_inputs(
        steps, case.length, case.images, case.channels, case.states, case.order == "grid",
        dtype=dtype,
    )  # fmt: skip
    del tensors["index"], tensors["length"]
    if "softplus" not in case.options:  # a negative step would make states grow
        tensors["dt"], tensors["dt_bias"] = tensors["dt"].abs() / 8, tensors["dt_bias"].abs() / 8
    off = set(OPTIONS) - set(case.options)
    laid_out = {n: None if n in off else layout(x.to(device)) for n, x in tensors.items()}
    on_device = None if case.order == "none" else index.to(device)
    rest = {"index": on_device, "length": case.length, "softplus": "softplus" in case.options}
    shape = (case.images, len(case.directions), case.length, case.channels)
    dy = gradient_layout(random(*shape, seed=9, dtype=dtype).to(device))
    return Arguments(dy, laid_out, rest)


def extreme_scan(
    dtype: torch.dtype, device: str = "cpu", channels: int = 7, states: int = 5
) -> Arguments:
    """A scan whose steps forget everything or nothing."""
    case = ScanCase("extreme", ("w2", "h"), (3, 3), channels, states, options=NO_GATE)
    arguments = scan_arguments(case, dtype, device)
    steps = torch.tensor([-3e4, -90, -20, 0, 20, 90, 3e4], dtype=dtype, device=device)
    decays = -torch.tensor([1e-12, 1e-4, 1.0, 1e4, 1e20], device=device)
    for name, values in (("dt", steps), ("A", decays)):
        shape = arguments.tensors[name].shape
        picked = torch.arange(shape.numel(), device=device) * 3 % len(values)
        arguments.tensors[name] = values[picked].reshape(shape)
    return arguments


def check_extreme_scan(
    backend: Backend, dtype: torch.dtype, kernels: str | None = None, **sizes: int
) -> None:
    """Decays of 0 and 1. In float16 the output saturates; gradients may overflow, not be NaN."""
    arguments = extreme_scan(dtype, backend.device, **sizes)
    if dtype == torch.float32:
        check_kernels("selective_scan", backend, arguments, dtype, kernels)
    results = run_kernels("selective_scan", kernels or backend.kernels, arguments)
    assert results["output"].isfinite().all()
    for name, x in results.items():
        assert not (x.isnan() if dtype == torch.float16 else ~x.isfinite()).any(), name
