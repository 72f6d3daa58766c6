"""Probabilities of the candidates of every layer over a search."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .style import FAINT, FLIP, PALE, PALETTE, colors, family, order_candidates, styled

_NAMED = 12
"""Maximum number of candidates with a legend; above it panels name only the kept directions."""

_MANY = 5
"""Maximum number of panels per row and of names per panel."""


@styled
def draw_probabilities(
    history: np.ndarray,
    candidates: Sequence[str],
    directions: Sequence[Sequence[str]],
    title: str = "",
) -> Figure:
    """Draws the probability of every candidate in every layer over epochs.

    Args:
        history: [epochs, layers, C], probabilities after each epoch.
        candidates: Names of the C candidates.
        directions: Directions that each layer keeps, drawn thick.
        title: Title of the figure.

    Returns:
        A panel per layer, on one scale; flips are dashed.
    """
    history = np.asarray(history, dtype=float)
    layers = history.shape[1]
    rows = math.ceil(layers / _MANY)
    columns = math.ceil(layers / rows)
    figure = Figure(figsize=(2.3 * columns + 1.2, 1.7 * rows + 0.8), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    draw = _draw_all if len(candidates) <= _NAMED else _draw_kept
    for layer, axes in enumerate(panels[:layers]):
        draw(axes, history[:, layer], list(candidates), list(directions[layer]))
        axes.axhline(1 / len(candidates), color=FAINT, lw=0.8, ls=":", zorder=0)
        axes.set_title(f"layer {layer + 1}", fontsize=8, pad=3)
        axes.tick_params(labelsize=7, length=2)
    for axes in panels[layers:]:
        axes.set_axis_off()
    for axes in panels[layers - columns : layers]:  # the lowest panel of each column
        axes.tick_params(labelbottom=True)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    if len(candidates) <= _NAMED:
        _draw_legend(figure, panels[0], list(candidates))
    figure.supxlabel("epoch", fontsize=9)
    figure.supylabel("probability", fontsize=9)
    figure.suptitle(title)
    return figure


def _draw_line(axes: Axes, values: np.ndarray, name: str, color: str, kept: bool) -> None:
    axes.plot(
        range(1, len(values) + 1),
        values,
        color=color,
        ls="--" if name.endswith(FLIP) else "-",
        lw=2.0 if kept else 0.8,
        marker="o" if len(values) == 1 else None,
        ms=3,
        zorder=3 if kept else 2,
        label=name,
    )


def _draw_all(axes: Axes, history: np.ndarray, candidates: list[str], kept: list[str]) -> None:
    """Draws a few candidates, a color per family."""
    palette = colors(candidates)
    for index, name in enumerate(candidates):
        _draw_line(axes, history[:, index], name, palette[family(name)], name in kept)


def _draw_kept(axes: Axes, history: np.ndarray, candidates: list[str], kept: list[str]) -> None:
    """Draws many candidates: kept ones colored and named in the panel, the others gray."""
    last = history[-1]
    ranked = sorted(kept, key=lambda name: -last[candidates.index(name)])
    for index, name in enumerate(candidates):
        if name not in kept:
            _draw_line(axes, history[:, index], name, PALE, kept=False)
    for rank, name in enumerate(ranked):
        color = PALETTE[rank % len(PALETTE)]
        _draw_line(axes, history[:, candidates.index(name)], name, color, kept=True)
        if rank < _MANY:
            y = 0.97 - 0.11 * rank
            axes.text(0.03, y, name, transform=axes.transAxes, fontsize=7, color=color, va="top")


def _draw_legend(figure: Figure, axes: Axes, candidates: list[str]) -> None:
    lines = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    names = order_candidates(candidates)
    legend = figure.legend(
        [lines[name] for name in names],
        names,
        loc="outside right center",
        title="thick: kept\n",
        title_fontsize=8,
    )
    for line in legend.get_lines():
        line.set_linewidth(1.6)
