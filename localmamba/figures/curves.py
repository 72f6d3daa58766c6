"""Loss and accuracy of training runs over epochs."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .._format import format_metric
from .style import FAINT, PALETTE, styled

Row = Mapping[str, float]


@styled
def draw_curves(histories: Mapping[str, Sequence[Row]], split: str, title: str = "") -> Figure:
    """Draws the training curves.

    Args:
        histories: Rows per epoch of each run, with `epoch`, `train_loss`, `val_loss` and
            `val_accuracy`.
        split: Name of the validation split.
        title: Title of the figure.

    Returns:
        Panels of loss (dashed for training images, with augmentation and label smoothing) and
        accuracy.
    """
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    for index, (name, rows) in enumerate(histories.items()):
        color = PALETTE[index % len(PALETTE)]
        epochs = [row["epoch"] for row in rows]
        marker = "o" if len(rows) == 1 else ""
        style = {"color": color, "lw": 1.6, "marker": marker}
        losses.plot(epochs, [row["train_loss"] for row in rows], ls="--", alpha=0.7, **style)
        losses.plot(epochs, [row["val_loss"] for row in rows], **style)
        final = format_metric("accuracy", rows[-1]["val_accuracy"], " %")
        accuracies.plot(
            epochs, [100 * row["val_accuracy"] for row in rows], label=f"{name}: {final}", **style
        )
    _label_losses(losses, split)
    _frame(losses, "cross entropy")
    _frame(accuracies, f"accuracy on {split} images, %")
    accuracies.legend(loc="lower right")
    figure.suptitle(title)
    return figure


def _label_losses(axes: Axes, split: str) -> None:
    axes.plot([], [], ls="--", color=FAINT, label="train (augmented)")
    axes.plot([], [], color=FAINT, label=split)
    axes.legend()
    axes.set_ylim(bottom=0)


def _frame(axes: Axes, label: str) -> None:
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25, lw=0.6)
