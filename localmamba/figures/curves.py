"""Loss and accuracy over the epochs of one or more trainings."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .style import FAINT, INK

COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette, for trainings in their order."""

Row = Mapping[str, float]


def draw_curves(histories: Mapping[str, Sequence[Row]], split: str, title: str = "") -> Figure:
    """Draws the training curves.

    Args:
        histories: Name of a training -> a row an epoch, with `epoch`, `train_loss`, `val_loss` and
            `val_accuracy`.
        split: What the images looked at while training are called.
        title: Written above.

    Returns:
        Two panels: loss (dashed on training images, which are augmented and whose targets are
        smoothed) and accuracy.
    """
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    for index, (name, rows) in enumerate(histories.items()):
        colour = COLOURS[index % len(COLOURS)]
        epochs = [row["epoch"] for row in rows]
        marker = "o" if len(rows) == 1 else ""
        style = {"color": colour, "lw": 1.6, "marker": marker}
        losses.plot(epochs, [row["train_loss"] for row in rows], ls="--", alpha=0.7, **style)
        losses.plot(epochs, [row["val_loss"] for row in rows], **style)
        shares = [100 * row["val_accuracy"] for row in rows]
        accuracies.plot(epochs, shares, label=f"{name}: {shares[-1]:.2f} %", **style)
    _label_losses(losses, split)
    _frame(losses, "cross entropy")
    _frame(accuracies, f"accuracy on {split} images, %")
    accuracies.legend(fontsize=8, frameon=False, loc="lower right")
    figure.suptitle(title, fontsize=12, color=INK)
    return figure


def _label_losses(axes: Axes, split: str) -> None:
    axes.plot([], [], ls="--", color=FAINT, label="train (augmented)")
    axes.plot([], [], color=FAINT, label=split)
    axes.legend(fontsize=8, frameon=False)
    axes.set_ylim(bottom=0)


def _frame(axes: Axes, label: str) -> None:
    axes.set_xlabel("epoch", fontsize=9, color=INK)
    axes.set_ylabel(label, fontsize=9, color=INK)
    axes.tick_params(labelsize=8, color=FAINT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, lw=0.6)
