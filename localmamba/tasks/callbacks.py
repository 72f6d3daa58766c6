"""Callbacks of every run: measurements, table of epochs, progress."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
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
from torch.distributed.tensor import DTensor

from localmamba._format import format_metric
from localmamba.tasks.classification import Classification
from localmamba.tasks.optimization import ends_step
from localmamba.tasks.run_folder import write_csv

LINES = 10
"""Lines that a training prints where there is no terminal, about."""


LOG_STEPS = 50
"""Steps of the optimizer between two entries in the log."""


@dataclass
class Tally:
    """Images and seconds since a moment, measured on the host."""

    start: float = field(default_factory=time.perf_counter)
    end: float = 0.0
    waited: float = 0.0
    images: int = 0

    def add(self, waited: float, images: int) -> None:
        """Adds a batch that ends now, after the loader was waited for so many seconds."""
        self.end = time.perf_counter()
        self.waited += waited
        self.images += images

    def figures(self) -> dict[str, float]:
        """Returns images per second, the loader's share of the time, and the peak of GPU memory.

        A GPU works on while the host waits for the loader: its share is what this may cost at most.
        """
        seconds = max(self.end - self.start, 1e-9)
        figures = {
            "images_per_second": round(self.images / seconds, 1),
            "loader_share": round(self.waited / seconds, 4),
        }
        if torch.cuda.is_initialized():
            figures["gpu_memory_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
        return figures


class Meter(Callback):
    """Measures a training and logs it every `LOG_STEPS` steps, for which alone the GPU is awaited.

    Logs the mean loss since the last entry, the learning rate and the norm of the gradient before
    clipping, and the figures of `Tally`.

    Attributes:
        epoch: Measurements of the epoch so far.
        latest: The last entry of the log.
    """

    def __init__(self) -> None:
        self.epoch = Tally()
        self.latest: dict[str, float] = {}
        self._recent = Tally()
        self._losses: list[torch.Tensor] = []
        self._norm: torch.Tensor | None = None
        self._free = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clocks, also of an epoch that is resumed."""
        del trainer, pl_module
        self.epoch, self._recent = Tally(), Tally()
        self._free = self.epoch.start

    on_train_epoch_start = on_train_start

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Computes the norm of the gradient, where it is logged."""
        del optimizer
        if (trainer.global_step + 1) % LOG_STEPS == 0:
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            self._norm = norm.full_tensor() if isinstance(norm, DTensor) else norm

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds the batch, and logs."""
        assert isinstance(module, Classification)
        # Lightning has divided the loss by the passes of a step.
        self._losses.append(outputs["loss"] * trainer.accumulate_grad_batches)
        for tally in (self.epoch, self._recent):
            tally.add(module.fetched - self._free, len(batch[1]) * trainer.world_size)
        if ends_step(trainer, batch_idx) and trainer.global_step % LOG_STEPS == 0:
            self.latest = {
                "loss": float(torch.stack(self._losses).mean()),
                "lr": _learning_rate(trainer),
                "gradient_norm": float("nan") if self._norm is None else float(self._norm),
                **self._recent.figures(),
            }
            for logger in trainer.loggers:
                entry = {f"step/{name}": value for name, value in self.latest.items()}
                logger.log_metrics(entry, trainer.global_step)
            self._losses, self._recent = [], Tally()
        self._free = time.perf_counter()


def _learning_rate(trainer: Trainer) -> float:
    return max(float(group["lr"]) for group in trainer.optimizers[0].param_groups)


class History(Callback):
    """Keeps a row an epoch: learning rate, every logged metric, what was measured, seconds.

    Args:
        meter: Measurements.
        path: CSV file, rewritten after each epoch; none if not given.
    """

    def __init__(self, meter: Meter, path: Path | None = None):
        self.meter = meter
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
        row = {"epoch": trainer.current_epoch + 1, "lr": _learning_rate(trainer), **metrics}
        measured = self.meter.epoch.figures()
        self.rows.append(row | measured | {"seconds": round(time.perf_counter() - self._start, 3)})
        for logger in trainer.loggers:
            entry = {f"epoch/{name}": value for name, value in measured.items()}
            logger.log_metrics(entry, trainer.global_step)
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
        meter: Measurements of a training.
    """

    def __init__(
        self,
        title: str,
        console: Console,
        note: Callable[[], str] = lambda: "",
        meter: Meter | None = None,
    ):
        self.title = title
        self.console = console
        self.note = note
        self.meter = meter
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
            latest = self.meter.latest if self.meter is not None else {}
            parts = [f"loss {latest['loss']:.3f}" if latest else "", self._rate(latest)]
            self._advance("  ".join(filter(None, parts)))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the epoch's figures."""
        del pl_module
        epoch, epochs = trainer.current_epoch + 1, trainer.max_epochs or 1
        metrics = (
            f"{k} {format_metric(k, float(v), ' %')}" for k, v in trainer.callback_metrics.items()
        )
        rate = self._rate(self.meter.epoch.figures() if self.meter is not None else {})
        figures = "  ".join(
            filter(None, [f"epoch {epoch}/{epochs}", *sorted(metrics), rate, self.note()])
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
            TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[now]}"),
            TextColumn("{task.fields[figures]}"),
        ]  # fmt: skip
        visible = self.console.is_terminal
        self._progress = Progress(
            *columns, console=self.console, transient=True, disable=not visible
        )
        self._progress.add_task(title, total=steps, completed=done, figures="", now="")
        self._progress.start()

    @staticmethod
    def _rate(figures: dict[str, float]) -> str:
        return f"{figures['images_per_second']:,.0f} images/s" if figures else ""

    def _advance(self, now: str = "") -> None:
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], advance=1, now=now)

    def _hide(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
