"""What a user sees of a training, and the table of its epochs."""

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from localmamba._format import format_metric
from localmamba.tasks.run_folder import write_csv

LINES = 10
"""Where there is no terminal, a training prints about so many lines."""


class History(Callback):
    """One row an epoch: learning rate, every logged metric, seconds; kept as a CSV file.

    Args:
        path: The file, rewritten after each epoch; none if not given.
    """

    def __init__(self, path: Path | None = None):
        self.path = path
        self.rows: list[dict[str, float]] = []
        self._start = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        del trainer, pl_module
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds the row; Lightning has validated by now."""
        del pl_module
        metrics = {key: float(value) for key, value in sorted(trainer.callback_metrics.items())}
        row = {"epoch": trainer.current_epoch + 1, "lr": _rate(trainer), **metrics}
        self.rows.append(row | {"seconds": round(time.perf_counter() - self._start, 3)})
        if self.path is not None and trainer.is_global_zero:
            write_csv(self.path, self.rows)


def _rate(trainer: Trainer) -> float:
    return float(trainer.optimizers[0].param_groups[0]["lr"])


class ProgressDisplay(Callback):
    """One bar for a whole training or evaluation; lines where there is no terminal.

    Args:
        title: Before the bar.
        console: Where to.
    """

    def __init__(self, title: str, console: Console):
        self.title = title
        self.console = console
        self._progress: Progress | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the bar, one step a batch."""
        del pl_module
        self._show(int(trainer.estimated_stepping_batches))

    def on_train_batch_end(self, *_: Any) -> None:
        """Moves the bar."""
        self._advance()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the epoch's figures."""
        del pl_module
        epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs or 1
        figures = f"epoch {epoch}/{epochs}  {figures_text(trainer.callback_metrics)}"
        if self._progress is not None and self.console.is_terminal:
            self._progress.update(self._progress.task_ids[0], figures=figures)
        elif epoch == epochs or epoch % max(1, epochs // LINES) == 0:
            self.console.print(f"{self.title}  {figures}", highlight=False, soft_wrap=True)

    def on_train_end(self, *_: Any) -> None:
        """Takes the bar away."""
        self._hide()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows a bar for an evaluation that stands alone."""
        del pl_module
        if self._progress is None and not trainer.training and not trainer.sanity_checking:
            self._show(int(sum(trainer.num_val_batches)))

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Moves the bar of an evaluation that stands alone."""
        if trainer.state.fn == "validate":
            self._advance()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the bar of an evaluation that stands alone away."""
        del pl_module
        if trainer.state.fn == "validate":
            self._hide()

    def on_exception(self, *_: Any) -> None:
        """Leaves the terminal as it was."""
        self._hide()

    def _show(self, steps: int) -> None:
        columns = [
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"),
        ]  # fmt: skip
        visible = self.console.is_terminal
        self._progress = Progress(
            *columns, console=self.console, transient=True, disable=not visible
        )
        self._progress.add_task(self.title, total=steps, figures="")
        self._progress.start()

    def _advance(self) -> None:
        if self._progress is not None:
            self._progress.advance(self._progress.task_ids[0])

    def _hide(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def figures_text(metrics: Any) -> str:
    """Metrics in one line: `train_loss 0.1234  val_accuracy 97.21 %`."""
    return "  ".join(
        f"{name} {format_metric(name, float(value), '%')}"
        for name, value in sorted(metrics.items())
    )
