"""Directions of every layer, in the form of the paper's figures 4 and 5."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .style import FAINT, FLIP, INK, PALE, colors, family, order_candidates, styled


@styled
def draw_directions(
    table: Sequence[Sequence[str]],
    title: str = "",
    candidates: Sequence[str] | None = None,
    depths: Sequence[int] = (),
) -> Figure:
    """Draws the directions of each layer: a column per layer, a row per direction.

    Args:
        table: Directions of each layer.
        title: Title of the figure.
        candidates: Directions of the rows; by default those in the table.
        depths: Number of layers per stage of a hierarchical model, to separate its stages.

    Returns:
        Figure with a filled cell, hatched for flips, for every direction of a layer, and the
        number of layers per direction on the right.
    """
    used = [name for row in table for name in row]
    rows = list(candidates) if candidates else order_candidates(used)
    layers = len(table)
    figure = Figure(figsize=(1.6 + 0.34 * max(layers, 10), 1.1 + 0.30 * len(rows)))
    axes = figure.subplots()
    palette = colors(rows)
    for y, name in enumerate(rows):
        for x, chosen in enumerate(table):
            _draw_cell(axes, x, y, name, palette[family(name)] if name in chosen else PALE)
        count = used.count(name)
        axes.text(layers + 0.25, y, str(count), va="center", fontsize=9)
    axes.text(layers + 0.25, -0.85, "layers", va="center", fontsize=8, color=FAINT)
    _draw_frame(axes, rows, layers, depths)
    axes.set_title(title, fontsize=12, loc="left", pad=18)
    return figure


def _draw_cell(axes: Axes, x: int, y: int, name: str, color: str) -> None:
    hatch = "/////" if name.endswith(FLIP) and color != PALE else None
    cell = Rectangle((x - 0.44, y - 0.42), 0.88, 0.84, facecolor=color, edgecolor="white")
    cell.set(hatch=hatch, linewidth=0)
    axes.add_patch(cell)


def _draw_frame(axes: Axes, rows: list[str], layers: int, depths: Sequence[int]) -> None:
    axes.set(xlim=(-0.6, layers + 0.9), ylim=(len(rows) - 0.4, -0.6))
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    step = 1 if layers <= 24 else 2
    shown = range(0, layers, step)
    axes.set_xticks(shown, [str(layer + 1) for layer in shown])
    axes.set_xlabel("layer")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for y in range(1, len(rows)):
        if family(rows[y]) != family(rows[y - 1]):
            axes.axhline(y - 0.5, color=FAINT, lw=0.6)
    edge = 0
    for stage, depth in enumerate(depths, start=1):
        axes.text(edge - 0.44, -0.85, f"stage {stage}", va="center", fontsize=8, color=FAINT)
        edge += depth
        if edge < layers:
            axes.axvline(edge - 0.5, color=INK, lw=1.0)
