"""How a search comes to its choice: probabilities of every layer over training."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .style import FAINT, FLIP, INK, PALE, colours, family, order_candidates

_NAMED = 12
"""With more candidates than this a panel names the directions that its layer keeps, no others."""

_MANY = 5


def draw_probabilities(
    history: np.ndarray,
    candidates: Sequence[str],
    directions: Sequence[Sequence[str]],
    title: str = "",
) -> Figure:
    """Draws the probability of every candidate in every layer over training.

    Args:
        history: [epochs, layers, C], probabilities after each epoch.
        candidates: C names.
        directions: What each layer keeps in the end: drawn thick.
        title: Written above.

    Returns:
        One panel a layer, all with one scale; flipped directions are dashed.
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
        axes.set_title(f"layer {layer + 1}", fontsize=8, color=INK, pad=3)
        axes.tick_params(labelsize=7, length=2, color=FAINT)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[layers:]:
        axes.set_axis_off()
    for axes in panels[layers - columns : layers]:  # the lowest of each column
        axes.tick_params(labelbottom=True)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    if len(candidates) <= _NAMED:
        _draw_legend(figure, panels[0], list(candidates))
    figure.supxlabel("epoch", fontsize=9, color=INK)
    figure.supylabel("probability", fontsize=9, color=INK)
    figure.suptitle(title, fontsize=12, color=INK)
    return figure


def _draw_line(axes: Axes, values: np.ndarray, name: str, colour: str, kept: bool) -> None:
    axes.plot(
        range(1, len(values) + 1),
        values,
        color=colour,
        ls="--" if name.endswith(FLIP) else "-",
        lw=2.0 if kept else 0.8,
        marker="o" if len(values) == 1 else None,
        ms=3,
        zorder=3 if kept else 2,
        label=name,
    )


def _draw_all(axes: Axes, history: np.ndarray, candidates: list[str], kept: list[str]) -> None:
    """A few candidates: a colour for each family."""
    palette = colours(candidates)
    for index, name in enumerate(candidates):
        _draw_line(axes, history[:, index], name, palette[family(name)], name in kept)


def _draw_kept(axes: Axes, history: np.ndarray, candidates: list[str], kept: list[str]) -> None:
    """Many candidates: the kept ones coloured and named in the panel, the others grey."""
    last = history[-1]
    ranked = sorted(kept, key=lambda name: -last[candidates.index(name)])
    palette = list(colours([]).values())
    for index, name in enumerate(candidates):
        if name not in kept:
            _draw_line(axes, history[:, index], name, PALE, kept=False)
    for rank, name in enumerate(ranked):
        colour = palette[rank % len(palette)]
        _draw_line(axes, history[:, candidates.index(name)], name, colour, kept=True)
        if rank < _MANY:
            y = 0.97 - 0.11 * rank
            axes.text(0.03, y, name, transform=axes.transAxes, fontsize=7, color=colour, va="top")


def _draw_legend(figure: Figure, axes: Axes, candidates: list[str]) -> None:
    lines = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    names = order_candidates(candidates)
    legend = figure.legend(
        [lines[name] for name in names],
        names,
        loc="outside right center",
        fontsize=8,
        frameon=False,
        title="thick: kept\n",
        title_fontsize=8,
    )
    for line in legend.get_lines():
        line.set_linewidth(1.6)
