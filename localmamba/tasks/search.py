"""A search for scan directions, from its job to the files of its run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from torch import Tensor

from localmamba.data.transforms import normalize
from localmamba.search import (
    Choice,
    Strategy,
    entropy,
    find_mixers,
    find_strategy,
    make_strategy,
)
from localmamba.tasks.checkpoints import save_checkpoint
from localmamba.tasks.classification import Classification
from localmamba.tasks.job import SearchJob
from localmamba.tasks.optimization import ends_step
from localmamba.tasks.run_folder import finish, write_csv
from localmamba.tasks.trainer import is_main_process, quiet_lightning
from localmamba.tasks.training import Run

SUPERNET, DIRECTIONS, PROBABILITIES = (
    "supernet.safetensors", "directions.json", "probabilities.csv",
)  # fmt: skip


@dataclass(frozen=True)
class Searched:
    """Result of a search.

    Attributes:
        choice: Directions of every layer, and their probabilities.
        history: Probabilities after each epoch, [epochs, layers, C].
        figures: Entropy, seconds, memory.
    """

    choice: Choice
    history: np.ndarray
    figures: dict[str, Any]


class SearchSteps(Callback):
    """Trains a supernet as its strategy says, within Lightning's training of the weights.

    Every process draws the same paths, and gradients of alpha are averaged over processes, so that
    a strategy has the same state in each of them.

    Args:
        job: Settings of the search.
        strategy: Strategy made for the model that is trained.
    """

    def __init__(self, job: SearchJob, strategy: Strategy):
        self.job, self.strategy = job, strategy
        self.folder: Path | None = None
        self.history: list[list[list[float]]] = []
        self.note = ""
        self._last: list[list[str]] = []
        self._losses: list[Tensor] = []
        self._held_out: list[tuple[Tensor, ...]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves a state that was restored before the model to the model's device."""
        del trainer, pl_module
        self.strategy.load_state_dict(self.strategy.state_dict())

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Sets the paths of the weights' batches of a step."""
        del pl_module, batch
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._losses, self._held_out = [], []
            self.strategy.start_weight_pass()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: tuple[Tensor, ...],
        batch_idx: int,
    ) -> None:
        """Trains alpha on the other halves of a step's batches, where the strategy has it so."""
        assert isinstance(pl_module, Classification)
        self._losses.append(outputs["loss"])  # divided by the number of batches of a step
        self._held_out.append(batch[2:])
        if not ends_step(trainer, batch_idx):
            return
        reduce = trainer.strategy.reduce
        self.strategy.record(reduce(torch.stack(self._losses).sum(), reduce_op="mean"))
        progress = (trainer.global_step - 1) / trainer.estimated_stepping_batches
        inputs = self.strategy.start_choice_pass(progress)
        if inputs:
            total = [torch.zeros_like(tensor) for tensor in inputs]
            for held_out in self._held_out:
                with trainer.precision_plugin.forward_context():
                    loss = pl_module.loss(held_out[0], held_out[1]) / len(self._held_out)
                total = [
                    a + b for a, b in zip(total, torch.autograd.grad(loss, inputs), strict=True)
                ]
            self.strategy.finish_choice_pass([reduce(g, reduce_op="mean") for g in total])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the probabilities and writes the choice as it stands."""
        del trainer, pl_module
        self.strategy.end_epoch()
        probabilities = self.strategy.probabilities()
        self.history.append(probabilities.tolist())
        choice = self.write(probabilities)
        pairs = zip(choice.directions, self._last or choice.directions, strict=True)
        self._last = choice.directions
        self.note = (
            f"entropy {_mean(entropy(probabilities)):.3f}  "
            f"choice changed in {sum(new != old for new, old in pairs)} of {len(self._last)} layers"
        )

    def write(self, probabilities: Tensor) -> Choice:
        """Makes the choice of these probabilities; the first process writes its files."""
        job = self.job
        choice = Choice(
            job.model,
            job.strategy,
            list(job.candidates),
            self.strategy.directions(probabilities),
            probabilities.tolist(),
            len(self.history),
            job.training.epochs,
            job.seed,
            job.settings(),
        )
        if self.folder is not None:
            choice.save(self.folder / DIRECTIONS)
            history = np.array(self.history)
            write_probabilities(self.folder / PROBABILITIES, history, job.candidates)
        return choice

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the strategy and the probabilities so far, for a checkpoint."""
        return {
            "strategy": self.strategy.state_dict(), "history": self.history, "last": self._last,
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of a checkpoint."""
        self.strategy.load_state_dict(state_dict["strategy"])
        self.history, self._last = state_dict["history"], state_dict["last"]


class Search(Run[SearchJob]):
    """A search that is ready to start: data loaded and checked, supernet and strategy made.

    Args:
        job: Settings of the search.

    Raises:
        ValueError: If the job's parts are not there or do not fit together.
    """

    command = "search"
    validates = False

    def __init__(self, job: SearchJob):
        weighted = {"search": find_strategy(job.strategy).weighted}
        super().__init__(job, list(job.candidates), {**weighted, **job.model_args})
        if job.checkpointing:
            # Every supernet is one of this package's models, which have this.
            self.model.set_grad_checkpointing()  # type: ignore[operator]
        for mixer in find_mixers(self.model):
            mixer.chunk_size = job.chunk_size
        self.strategy = make_strategy(job.strategy, self.model, job.search, job.seed)
        self.steps = SearchSteps(job, self.strategy)
        self.data = self.image_data(job.search.choice_share if self.strategy.uses_holdout else 0.0)

    def note(self) -> str:
        """Returns the entropy and the number of layers whose choice has changed."""
        return self.steps.note

    def run(
        self,
        folder: Path | None = None,
        console: Console | None = None,
        title: str = "",
        resume: bool = False,
        callbacks: Sequence[Callback] = (),
    ) -> Searched | None:
        """Trains the supernet and writes its choice, from the first epoch on.

        Takes, returns and raises the same as `Training.run`. The folder gets directions.json,
        probabilities.csv and metrics.csv after each epoch, in the end metrics.json and, if a final
        model can start from it, supernet.safetensors.
        """
        main = is_main_process()
        steps, title = self.steps, title or self.job.model
        steps.folder = folder if main else None
        trainer, module = self.fit(folder, console, title, resume, [steps, *callbacks])
        with quiet_lightning():
            probabilities, tried = self.conclude(trainer, module, console if main else None, title)
        if not main:
            return None
        choice = steps.write(probabilities)
        layers, rows = entropy(choice.probabilities), self.history.rows
        cuda = trainer.strategy.root_device.type == "cuda"
        figures = {
            "entropy": _mean(layers),
            "entropy_of_layers": layers,
            "train_loss": rows[-1]["train_loss"],
            "seconds": sum(row["seconds"] for row in rows),
            "choices_tried": tried,
            "gpu_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        }
        if folder is not None:
            if self.strategy.reusable:
                save_checkpoint(folder / SUPERNET, self.model, self.card({}))
            finish(folder, figures)
        return Searched(choice, np.array(steps.history), figures)

    def conclude(
        self, trainer: Trainer, module: Classification, console: Console | None, title: str
    ) -> tuple[Tensor, int]:
        """Returns the final probabilities [layers, C], and how many choices were tried for them."""
        device = trainer.strategy.root_device
        module.to(device).eval()
        batches: list[tuple[Tensor, Tensor]] = []
        count = tried = 0
        if self.strategy.uses_holdout:
            # The same images for every choice, without augmentation.
            held_out = np.random.default_rng(self.job.seed).permutation(self.data.parts()[1])
            held_out = held_out[: self.strategy.settings.val_images]
            count = len(held_out)
            loader = self.data.loader(self.data.dataset("train"), self.data.share(held_out))
            batches = [(normalize(x.to(device), self.spec), y.to(device)) for x, y in loader]
        status = console.status(title) if console is not None else None

        @torch.no_grad()
        def held_out_loss() -> float:
            nonlocal tried
            total = torch.zeros((), device=device)
            for images, labels in batches:
                with trainer.precision_plugin.forward_context():
                    logits = module(images)
                total += F.cross_entropy(logits.float(), labels, reduction="sum")
            tried += 1
            if status is not None:
                status.update(f"{tried} choices tried")
            return float(trainer.strategy.reduce(total, reduce_op="sum")) / count

        if status is not None:
            status.start()
        try:
            return self.strategy.conclude(held_out_loss), tried
        finally:
            if status is not None:
                status.stop()
            module.cpu()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def write_probabilities(path: Path, history: np.ndarray, candidates: Sequence[str]) -> None:
    """Writes a row for each epoch and layer, with a column for each candidate."""
    rows = [
        {"epoch": epoch, "layer": layer, **dict(zip(candidates, values, strict=True))}
        for epoch, table in enumerate(history.tolist(), start=1)
        for layer, values in enumerate(table, start=1)
    ]
    write_csv(path, rows)


def read_probabilities(path: Path) -> tuple[np.ndarray, list[str]]:
    """Reads what `write_probabilities` wrote: [epochs, layers, C] and the candidates.

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
