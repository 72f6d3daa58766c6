"""Exported programs of the scan and of a block's branches serve every batch and grid."""

import pytest
import torch
from torch import Tensor, nn

from localmamba.ops import s6_branches, scan_index, selective_scan

DIRECTIONS = ["h", "v_flip", "w2"]
CHANNELS, RANK = 8, 3
GRIDS = [(1, 1), (2, 3), (3, 5), (1, 9), (8, 8), (9, 8), (13, 11)]
"""(H, W), with fewer and more than the 64 steps between two kept states."""


class Branches(nn.Module):
    """The S6 branches of maps [B, H, W, D]."""

    def __init__(self, conv: bool, states: int) -> None:
        super().__init__()
        self.x_proj = nn.Parameter(torch.randn(3, RANK + 2 * states, CHANNELS) / 8)
        self.dt_weight = nn.Parameter(torch.randn(3, CHANNELS, RANK))
        self.dt_bias = nn.Parameter(torch.randn(3, CHANNELS))
        self.A = nn.Parameter(-torch.rand(3, CHANNELS, states))
        self.D = nn.Parameter(torch.randn(3, CHANNELS))
        self.conv_weight = nn.Parameter(torch.randn(3, CHANNELS, 4)) if conv else None
        self.conv_bias = nn.Parameter(torch.randn(3, CHANNELS)) if conv else None

    def forward(self, x: Tensor) -> Tensor:
        index = scan_index(x, DIRECTIONS, x.shape[1], x.shape[2])
        return s6_branches(
            x.flatten(1, 2), self.x_proj, self.dt_weight, self.dt_bias, self.A, self.D, index,
            self.conv_weight, self.conv_bias,
        )  # fmt: skip


class Scan(Branches):
    """The scan alone, with every option, of inputs made from maps."""

    def forward(self, x: Tensor) -> Tensor:
        index = scan_index(x, DIRECTIONS, x.shape[1], x.shape[2])
        u, states = x.flatten(1, 2), self.A.shape[2]
        dt = u[:, None] * self.D[:, None]
        B, C = dt[..., :states], dt[..., -states:]
        return selective_scan(u, dt, self.A, B, C, self.D, u, self.dt_bias, index)


MODULES = {
    "branches": lambda states: Branches(False, states),
    "branches with convolution": lambda states: Branches(True, states),
    "scan": lambda states: Scan(False, states),
}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize(
    ("example", "states"),
    [((2, 3, 5), 4), ((2, 9, 8), 4), ((2, 3, 5), 1), ((1, 9, 8), 4), ((1, 3, 5), 1)],
    ids=str,
)
@pytest.mark.parametrize("name", MODULES)
def test_batch_and_grid_are_free(
    name: str, example: tuple[int, int, int], states: int, grad: bool
) -> None:
    """`torch.export` makes a constant of a size that is 1 in the example, of any model."""
    torch.manual_seed(0)
    module = MODULES[name](states)
    sizes = {1: torch.export.Dim("height"), 2: torch.export.Dim("width")}
    if example[0] > 1:
        sizes[0] = torch.export.Dim("batch")
    with torch.set_grad_enabled(grad):
        x = torch.randn(*example, CHANNELS)
        program = torch.export.export(module, (x,), dynamic_shapes={"x": sizes}).module()
        for grid in GRIDS:
            for batch in (1, 3) if example[0] > 1 else (1,):
                x = torch.randn(batch, *grid, CHANNELS)
                torch.testing.assert_close(program(x), module(x))


def test_exported_program_trains() -> None:
    torch.manual_seed(0)
    module = Branches(True, 4)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("height"), 2: torch.export.Dim("w")}
    example = torch.randn(2, 3, 5, CHANNELS)
    program = torch.export.export(module, (example,), dynamic_shapes={"x": sizes}).module()
    x = torch.randn(3, 9, 11, CHANNELS)
    gradients = torch.autograd.grad(program(x).square().sum(), list(program.parameters()))
    expected = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other)
