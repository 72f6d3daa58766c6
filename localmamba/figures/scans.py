"""Scan orders drawn on a grid (paper figure 1)."""

import math
import re
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from ..ops import scan_order
from .style import FAINT, INK, PALE, styled

_NUMBERED = 64
"""Maximum number of tokens for which the figure shows the step of each token."""


@styled
def draw_scans(directions: list[str], grid: tuple[int, int], columns: int = 4) -> Figure:
    """Draws the path of each direction over a grid of tokens, from dark (first) to light (last).

    Args:
        directions: Names of scan directions.
        grid: (H, W) in tokens.
        columns: Maximum number of panels per row.

    Returns:
        A panel per direction, windows outlined. A dot marks the first token and a square the last;
        on grids of up to 64 tokens, numbers show the step of each token instead.

    Raises:
        ValueError: If a direction is unknown or the grid is empty.
    """
    orders = [scan_order(name, grid) for name in directions]
    height, width = grid
    rows = math.ceil(len(orders) / columns)
    columns = math.ceil(len(orders) / rows)
    side = 3.4 if len(orders) > 1 else 4.5
    size = (side * columns, rows * (side * height / width + 0.4))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, order in zip(panels, orders, strict=False):
        _draw_grid(axes, order.name, grid)
        _draw_path(axes, order.index[order.index >= 0], width)
        axes.set_title(order.name, fontsize=12)
    for axes in panels[len(orders) :]:
        axes.set_axis_off()
    return figure


def _draw_grid(axes: Axes, name: str, grid: tuple[int, int]) -> None:
    height, width = grid
    axes.set(xlim=(-0.55, width - 0.45), ylim=(height - 0.45, -0.55), aspect="equal")
    axes.set_axis_off()
    window_height, window_width = _window(name) or grid
    for row in range(height + 1):
        border = row % window_height == 0 or row == height
        axes.hlines(row - 0.5, -0.5, width - 0.5, lw=1.0, **_line(border))
    for column in range(width + 1):
        border = column % window_width == 0 or column == width
        axes.vlines(column - 0.5, -0.5, height - 0.5, lw=1.0, **_line(border))


def _line(border: bool) -> dict[str, Any]:
    return {"color": FAINT, "zorder": 1.5} if border else {"color": PALE, "zorder": 1.0}


def _window(name: str) -> tuple[int, int] | None:
    """Returns the window (h, w) of a windowed direction, else None."""
    match = re.fullmatch(r"w(\d+)(?:x(\d+))?(?:_flip)?", name)
    return match and (int(match[1]), int(match[2] or match[1]))


def _draw_path(axes: Axes, tokens: np.ndarray, width: int) -> None:
    points = np.stack([tokens % width, tokens // width], axis=1)  # [L, 2] as x, y
    lines = np.stack([points[:-1], points[1:]], axis=1)
    shades = np.linspace(0.0, 0.85, len(points))
    path = LineCollection(list(lines), cmap="viridis", array=shades[:-1], lw=1.8, capstyle="round")
    path.set_clim(0, 1)
    axes.add_collection(path)
    colors = path.get_cmap()(shades)
    if len(tokens) <= _NUMBERED:
        _draw_steps(axes, points, colors)
    else:
        axes.plot(*points[-1], "s", ms=7, color=colors[-1], zorder=3)
        axes.plot(*points[0], "o", ms=8, color=colors[0], zorder=4)


def _draw_steps(axes: Axes, points: np.ndarray, colors: np.ndarray) -> None:
    """Writes the number of each step on its token."""
    for step, ((x, y), color) in enumerate(zip(points, colors, strict=True), start=1):
        axes.plot(x, y, "o", ms=14, color=color, zorder=3)
        ink = INK if color[1] > 0.6 else "white"
        axes.text(x, y, str(step), fontsize=7, color=ink, ha="center", va="center", zorder=4)
