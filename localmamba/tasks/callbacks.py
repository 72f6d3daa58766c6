"""Callbacks of every run: table of epochs, progress."""

import time
from collections.abc import Callable
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
from localmamba.tasks.optimization import ends_step
from localmamba.tasks.run_folder import write_csv

LINES = 10
"""Lines that a training prints where there is no terminal, about."""


class History(Callback):
    """Keeps a row an epoch: learning rate, every logged metric, seconds.

    Args:
        path: CSV file, rewritten after each epoch; none if not given.
    """

    def __init__(self, path: Path | None = None):
        self.path = path
        self.rows: list[dict[str, float]] = []
        self._start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock of an epoch that is resumed."""
        del trainer, pl_module
        self._start = time.perf_counter()

    on_train_epoch_start = on_train_start

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds the row; Lightning has validated by now."""
        del pl_module
        metrics = {key: float(value) for key, value in sorted(trainer.callback_metrics.items())}
        rate = max(float(group["lr"]) for group in trainer.optimizers[0].param_groups)
        row = {"epoch": trainer.current_epoch + 1, "lr": rate, **metrics}
        self.rows.append(row | {"seconds": round(time.perf_counter() - self._start, 3)})
        if self.path is not None:
            write_csv(self.path, self.rows)

    def state_dict(self) -> dict[str, Any]:
        """Returns the rows, for a checkpoint."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the rows of a checkpoint."""
        self.rows = state_dict["rows"]


class ProgressDisplay(Callback):
    """Shows one bar for a whole training or evaluation; lines where there is no terminal.

    Args:
        title: Text before the bar.
        console: Console of the bar.
        note: Returns a text to follow the figures of an epoch.
    """

    def __init__(self, title: str, console: Console, note: Callable[[], str] = lambda: ""):
        self.title = title
        self.console = console
        self.note = note
        self._progress: Progress | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the bar."""
        del pl_module
        self._show(self.title, int(trainer.estimated_stepping_batches), trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the bar."""
        del module, outputs, batch
        if ends_step(trainer, batch_idx):
            self._advance()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the epoch's figures."""
        del pl_module
        epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs or 1
        metrics = (
            f"{k} {format_metric(k, float(v), ' %')}" for k, v in trainer.callback_metrics.items()
        )
        figures = "  ".join(
            filter(None, [f"epoch {epoch}/{epochs}", *sorted(metrics), self.note()])
        )
        if self._progress is not None and self.console.is_terminal:
            self._progress.update(self._progress.task_ids[0], figures=figures)
        elif epoch == epochs or epoch % max(1, epochs // LINES) == 0:
            text = f"{self.title}  {figures}"
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows a bar for an evaluation outside a training."""
        del pl_module
        if trainer.state.fn == "validate":
            self._show("evaluating", int(sum(trainer.num_val_batches)))

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Moves the bar of an evaluation."""
        if trainer.state.fn == "validate":
            self._advance()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes the bar of an evaluation."""
        del pl_module
        if trainer.state.fn == "validate":
            self._hide()

    def on_train_end(self, *_: Any) -> None:
        """Removes the bar."""
        self._hide()

    def on_exception(self, *_: Any) -> None:
        """Removes the bar."""
        self._hide()

    def _show(self, title: str, steps: int, done: int = 0) -> None:
        columns = [
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"),
        ]  # fmt: skip
        visible = self.console.is_terminal
        self._progress = Progress(
            *columns, console=self.console, transient=True, disable=not visible
        )
        self._progress.add_task(title, total=steps, completed=done, figures="")
        self._progress.start()

    def _advance(self) -> None:
        if self._progress is not None:
            self._progress.advance(self._progress.task_ids[0])

    def _hide(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
