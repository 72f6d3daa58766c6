"""Position tables, resampled to the grid of the input, and the axial rotary embedding."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .precision import at_least_float32

torch.fx.wrap("resize_table")


def resize_table(
    table: Tensor, grid: tuple[int, int], height: int, width: int, class_token: bool = False
) -> Tensor:
    """Resamples a position table to another grid, bicubically, as the released backbones do.

    Args:
        table: [1, H * W, C]; with `class_token`, [1, H * W + 1, C], that token's row in the middle.
        grid: (H, W) of the table.
        height: Rows of the new grid.
        width: Columns of the new grid.
        class_token: Whether the row at H * W // 2 belongs to a class token.

    Returns:
        [1, height * width (+ 1), C]; the table itself if the grid is the same.
    """
    # Symbolic sizes are not compared: that would specialize an exported program.
    known = torch.jit.is_scripting() or isinstance(height, int)
    if known and grid[0] == height and grid[1] == width:
        return table
    middle, new = grid[0] * grid[1] // 2, height * width // 2
    tokens = table
    if class_token:
        tokens = torch.cat((table[:, :middle], table[:, middle + 1 :]), dim=1)
    image = at_least_float32(tokens).reshape(grid[0], grid[1], -1)
    image = _resize_rows(image, height).transpose(0, 1)
    image = _resize_rows(image, width).transpose(0, 1)
    out = image.flatten(0, 1)[None].to(table.dtype)
    if class_token:
        out = torch.cat((out[:, :new], table[:, middle : middle + 1], out[:, new:]), dim=1)
    return out


def _resize_rows(x: Tensor, rows: int) -> Tensor:
    """Bicubic along the first axis: [R, *, C] -> [rows, *, C].

    A weighted sum, with weights from PyTorch's resampling of the unit matrix: the backward pass of
    `F.interpolate` on a GPU adds in no fixed order, and autocast would round a matrix product.
    """
    unit = torch.eye(x.shape[0], dtype=x.dtype, device=x.device)[None, :, :, None]
    weights = F.interpolate(unit, size=(rows, 1), mode="bicubic", align_corners=False)
    weights = weights[0, :, :, 0].t()  # [rows, R]
    return (weights[:, :, None, None] * x).sum(1)


class AxialRotary(nn.Module):
    """Tables of the axial rotary embedding: half of the channels rotate by row, half by column.

    Angles are t / theta^(2i / (C / 2)), t the row or column scaled so that a grid spans `span`
    steps whatever its size. The tables are saved with a model: one whose positions were resized
    keeps resized rotary tables too, as in the release.

    Args:
        dim: Channels C, a multiple of 4.
        grid: (H, W).
        span: Length that rows and columns are scaled to (14, the released models' grid).
        theta: Base of the frequencies.
        device: Device of the tables.
        dtype: Dtype of the tables; they are computed in float32.

    Raises:
        ValueError: If C is not a multiple of 4.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        span: float = 14.0,
        theta: float = 10000.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim % 4:
            raise ValueError(f"rotary positions need a width divisible by 4, got {dim}")
        self.dim, self.span, self.theta = dim, span, theta
        cos, sin = self.tables(grid, device)
        self.register_buffer("cos", cos.to(dtype))
        self.register_buffer("sin", sin.to(dtype))

    def tables(
        self, grid: tuple[int, int], device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Computes cosines and sines for a grid, each float32 [1, H * W, C]."""
        half = self.dim // 2
        steps = torch.arange(0, half, 2, device=device).float()
        frequencies = 1.0 / self.theta ** (steps / half)
        angles = []
        for axis, size in enumerate(grid):
            position = torch.arange(size, device=device) / size * self.span
            angle = (position[:, None] * frequencies).repeat_interleave(2, -1)
            angles.append(angle.unsqueeze(1 - axis).expand(grid[0], grid[1], half))
        table = torch.cat(angles, dim=-1).reshape(1, -1, self.dim)
        return table.cos(), table.sin()

    def forward(self, grid: tuple[int, int], height: int, width: int) -> tuple[Tensor, Tensor]:
        """Resamples the tables from their own grid to another one."""
        cos = resize_table(self.cos, grid, height, width)
        return cos, resize_table(self.sin, grid, height, width)
