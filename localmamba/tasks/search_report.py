"""What a user sees of a search while it runs, and the files that it leaves."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from localmamba.search import Choice, entropy
from localmamba.tasks.run_folder import write_csv
from localmamba.tasks.search_job import SearchJob
from localmamba.tasks.search_loop import SearchLoop

DIRECTIONS, PROBABILITIES = "directions.json", "probabilities.csv"


class SearchReport:
    """Writes the files of a search after each epoch and shows how far it is.

    Args:
        job: The search.
        loop: Its loop.
        folder: Where files go.
        console: Where progress is shown; nowhere if not given.
        title: Before the progress bar.
    """

    def __init__(
        self,
        job: SearchJob,
        loop: SearchLoop,
        folder: Path,
        console: Console | None,
        title: str,
    ):
        self.job, self.loop, self.folder, self.console = job, loop, folder, console
        self.title = title
        self._last: list[list[str]] = []
        self._tried = 0
        visible = console is not None and console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("{task.fields[figures]}"),
            console=console, transient=True, disable=not visible,
        )  # fmt: skip
        done = loop.progress.epoch * loop.data.steps
        self._task = self._bar.add_task(title, total=loop.steps, completed=done, figures="")

    def __enter__(self) -> "SearchReport":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def step(self) -> None:
        """A training step is done."""
        self._bar.advance(self._task)

    def choice(self) -> None:
        """A choice of directions was tried on held-out images."""
        self._tried += 1
        self._bar.update(self._task, figures=f"{self._tried} choices tried")

    def write(self, probabilities: Tensor) -> Choice:
        """Writes the choice as it stands, and says how it has changed."""
        job, progress = self.job, self.loop.progress
        choice = Choice(
            job.model,
            job.strategy,
            list(job.candidates),
            self.loop.strategy.directions(probabilities),
            probabilities.tolist(),
            progress.epoch,
            job.training.epochs,
            job.seed,
            job.settings(),
        )
        choice.save(self.folder / DIRECTIONS)
        history = np.array(progress.history)
        write_probabilities(self.folder / PROBABILITIES, history, job.candidates)
        write_csv(self.folder / "metrics.csv", progress.rows)
        self._show(choice)
        return choice

    def _show(self, choice: Choice) -> None:
        pairs = zip(choice.directions, self._last or choice.directions, strict=True)
        changed = sum(new != old for new, old in pairs)
        self._last = choice.directions
        row = self.loop.progress.rows[-1]
        text = (
            f"epoch {choice.epoch}/{choice.epochs}  train_loss {row['train_loss']:.4f}  "
            f"entropy {_mean(entropy(choice.probabilities)):.3f}  "
            f"choice changed in {changed} of {len(choice.directions)} layers"
        )
        if self._bar.disable and self.console is not None:
            if choice.epoch % max(1, choice.epochs // 10) == 0:
                self.console.print(f"{self.title}  {text}", highlight=False, soft_wrap=True)
        else:
            self._bar.update(self._task, figures=text)

    def figures(self, choice: Choice) -> dict[str, Any]:
        """Entropy of each layer and in the mean, seconds, memory."""
        cuda = self.loop.device.type == "cuda"
        layers = entropy(choice.probabilities)
        return {
            "entropy": _mean(layers),
            "entropy_of_layers": layers,
            "train_loss": self.loop.progress.rows[-1]["train_loss"],
            "seconds": sum(row["seconds"] for row in self.loop.progress.rows),
            "choices_tried": self._tried,
            "gpu_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def write_probabilities(path: Path, history: np.ndarray, candidates: Sequence[str]) -> None:
    """A row for each epoch and layer, a column for each candidate."""
    rows = [
        {"epoch": epoch, "layer": layer, **dict(zip(candidates, values, strict=True))}
        for epoch, table in enumerate(history.tolist(), start=1)
        for layer, values in enumerate(table, start=1)
    ]
    write_csv(path, rows)


def read_probabilities(path: Path) -> tuple[np.ndarray, list[str]]:
    """The inverse of `write_probabilities`: [epochs, layers, C] and the candidates.

    Raises:
        ValueError: If the file is missing or of another kind.
    """
    try:
        header, *lines = path.read_text().splitlines()
        table = np.array([line.split(",") for line in lines], dtype=float)
        layers = int(table[:, 1].max())
        return table[:, 2:].reshape(-1, layers, table.shape[1] - 2), header.split(",")[2:]
    except (OSError, ValueError, IndexError) as error:
        raise ValueError(f"{path} does not hold the probabilities of a search: {error}") from None
