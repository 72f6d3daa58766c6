"""Confusion matrix of a classifier."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from .style import FAINT, INK, PALETTE, styled

FEW = 40
"""With more classes than this, cells stand for groups of classes."""

CELLS = 100
"""Cells a side for many classes, at most."""

PAIRS = 20
"""Most frequent errors that are listed for many classes."""

MAP = "Blues"


@styled
def draw_confusion(matrix: np.ndarray, classes: Sequence[str], title: str = "") -> Figure:
    """Draws a confusion matrix.

    Args:
        matrix: Images of each class (row) and predicted class (column), [C, C].
        classes: Names of the C classes; of `goldfish, Carassius auratus` the first part is shown.
        title: Title of the figure.

    Returns:
        For few classes, a cell for each pair with its share of the row in percent. For many, errors
        by groups of neighboring classes, the most frequent errors and the distribution of recall.
    """
    names = [_shorten(name.split(",")[0]) for name in classes]
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    draw = _draw_cells if len(names) <= FEW else _draw_groups
    figure = draw(matrix, shares, names)
    figure.suptitle(title)
    return figure


def _shorten(name: str, length: int = 24) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _draw_cells(matrix: np.ndarray, shares: np.ndarray, names: list[str]) -> Figure:
    count = len(names)
    side = 2.2 + 0.38 * count
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    axes = figure.subplots()
    # The square root of the share, so that rare errors are seen.
    image = axes.imshow(100 * shares, cmap=MAP, norm=PowerNorm(0.5, 0, 100))
    for row, column in zip(*matrix.nonzero(), strict=True):
        share = 100 * shares[row, column]
        text = f"{share:.0f}" if share >= 0.5 else "<1"
        color = "white" if share > 40 else INK
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(range(count), names, rotation=90 if max(map(len, names)) > 3 else 0)
    axes.set_yticks(range(count), names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("class")
    label = "% of the images of a class"
    figure.colorbar(image, ax=axes, shrink=0.7, label=label, ticks=[0, 1, 5, 20, 50, 100])
    return figure


def _draw_groups(matrix: np.ndarray, shares: np.ndarray, names: list[str]) -> Figure:
    figure = Figure(figsize=(14, 7.5), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.7, 1), height_ratios=(2.2, 1))
    _draw_errors(figure, figure.add_subplot(grid[:, 0]), matrix, names)
    _draw_pairs(figure.add_subplot(grid[0, 1]), matrix, names)
    _draw_recall(figure.add_subplot(grid[1, 1]), shares.diagonal()[matrix.sum(1) > 0])
    return figure


def _draw_errors(figure: Figure, axes: Axes, matrix: np.ndarray, names: list[str]) -> None:
    """Draws the errors, added up over groups of classes, so that a single one is seen."""
    count = len(names)
    size = -(-count // CELLS)
    starts = np.arange(0, count, size)
    errors = matrix - np.diag(matrix.diagonal())
    cells = np.add.reduceat(np.add.reduceat(errors, starts, axis=0), starts, axis=1)
    shown = np.ma.masked_equal(cells, 0)
    edges = (-0.5, count - 0.5)
    image = axes.imshow(
        shown, cmap=MAP, norm=LogNorm(0.7, max(2, cells.max())), extent=(*edges, *edges[::-1]),
        interpolation="nearest",
    )  # fmt: skip
    ticks = range(0, count, -(-count // 10))
    labels = [f"{names[i]}  {i}" for i in ticks]
    axes.set_yticks(ticks, labels)
    axes.set_xticks(ticks, labels, rotation=90)
    axes.tick_params(color=FAINT)
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color(FAINT)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("class")
    unit = f"a cell: {size} x {size} classes" if size > 1 else "a cell: one pair of classes"
    bar = figure.colorbar(image, ax=axes, shrink=0.7, label=f"wrongly classified images ({unit})")
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())


def _draw_pairs(axes: Axes, matrix: np.ndarray, names: list[str]) -> None:
    errors = matrix - np.diag(matrix.diagonal())
    order = np.argsort(-errors, axis=None, kind="stable")[:PAIRS]
    pairs = [divmod(int(i), len(names)) for i in order if errors.flat[i]]
    texts = [f"{names[row]} → {names[column]}" for row, column in pairs]
    counts = [int(errors[pair]) for pair in pairs]
    bars = axes.barh(range(len(pairs)), counts, color=PALETTE[0], height=0.7)
    axes.bar_label(
        bars, [f"{n} of {matrix[row].sum()}" for n, (row, _) in zip(counts, pairs, strict=True)],
        padding=3, fontsize=7,
    )  # fmt: skip
    axes.set_yticks(range(len(pairs)), texts, fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.15, y=0.02)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_title("most frequent errors: class → predicted class")


def _draw_recall(axes: Axes, recall: np.ndarray) -> None:
    axes.hist(100 * recall, bins=np.arange(0, 101, 5).tolist(), color=PALETTE[0], rwidth=0.9)
    axes.set_xlabel("recall of a class, %")
    axes.set_ylabel("classes")
    axes.set_title(f"mean {100 * recall.mean():.1f} %, lowest {100 * recall.min():.1f} %")
