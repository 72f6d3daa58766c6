"""A training, from its job to the files of its run."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging
from rich.console import Console
from torch import nn

from localmamba.data import InputSpec, Source, check_trainable, load_source
from localmamba.data.module import ImageData
from localmamba.models.loading import build_model
from localmamba.search.reuse import start_from_supernet
from localmamba.tasks.building import input_spec, model_arguments, model_directions
from localmamba.tasks.callbacks import History, ProgressDisplay
from localmamba.tasks.checkpoints import Card, load_checkpoint, save_checkpoint
from localmamba.tasks.classification import Classification
from localmamba.tasks.evaluation import evaluate_model
from localmamba.tasks.job import TrainingJob
from localmamba.tasks.run_folder import versions, write_json
from localmamba.tasks.trainer import is_main_process, make_trainer, quiet_lightning


@dataclass(frozen=True)
class Trained:
    """What a training came to.

    Attributes:
        model: In evaluation mode.
        card: What its checkpoint says, final metrics included.
        directions: Of every block; empty for a model that has none.
        history: A row an epoch.
        split: The split of the final metrics.
    """

    model: nn.Module
    card: Card
    directions: list[list[str]]
    history: list[dict[str, float]]
    split: str

    def save(self, folder: Path) -> list[Path]:
        """Writes model.safetensors, metrics.json and, if there are any, directions.json."""
        checkpoint = folder / "model.safetensors"
        save_checkpoint(checkpoint, self.model, self.card)
        metrics = {"split": self.split, **self.card.metrics, "made_with": versions()}
        paths = [checkpoint, write_json(folder / "metrics.json", metrics)]
        if self.directions:
            entry = {"model": self.card.model, "directions": self.directions}
            paths.append(write_json(folder / "directions.json", entry))
        return paths


class Training:
    """A training that is ready to start: data loaded and checked, model made.

    Args:
        job: What to train, on what and how.

    Raises:
        ValueError: If the job's parts are not there or do not fit together.
    """

    def __init__(self, job: TrainingJob):
        self.job = job
        self.source = load_source(job.data, job.images)
        check_trainable(self.source)
        self.spec = input_spec(job.model, job.images, self.source.channels)
        with quiet_lightning():
            seed_everything(job.seed, workers=True, verbose=False)
        self.model, self.arguments = make_model(job, self.source, self.spec)
        self.data = ImageData(self.source, self.spec, job.images, job.augmentation)
        self.data.setup("fit")

    def run(
        self, folder: Path | None = None, console: Console | None = None, title: str = ""
    ) -> Trained | None:
        """Trains, then evaluates the last weights on held-out images.

        Args:
            folder: Gets metrics.csv while it runs.
            console: Where progress is shown; nowhere if not given.
            title: Before the progress bar; the model's name by default.

        Returns:
            What came of it; None in all processes but the first, where there are several.

        Raises:
            ValueError: If the input or the loss is no longer finite.
        """
        job = self.job
        history = History(folder / "metrics.csv" if folder else None)
        module = Classification(
            self.model, len(self.source.classes), job.training, job.augmentation
        )
        callbacks = _callbacks(job, history, title or job.model, console)
        with quiet_lightning():
            seed_everything(job.seed, workers=True, verbose=False)
            trainer = make_trainer(
                job.hardware, callbacks, job.training.epochs, job.training.clip_grad
            )
            trainer.fit(module, datamodule=self.data)
        if not is_main_process():
            return None
        split = self.source.final
        held_out = ImageData(self.source, self.spec, job.images, evaluated=split)
        metrics = evaluate_model(self.model, held_out, replace(job.hardware, devices=1), console)
        directions = model_directions(self.model)
        return Trained(self.model.eval(), self.card(metrics), directions, history.rows, split)

    def card(self, metrics: dict[str, float]) -> Card:
        """What the checkpoint says of itself."""
        images = self.job.images
        return Card(
            model=self.job.model,
            arguments=self.arguments,
            classes=self.source.classes,
            input=self.spec,
            data=self.source.name,
            held_out=images.held_out,
            split_seed=images.split_seed,
            metrics=metrics,
        )


def make_model(
    job: TrainingJob, source: Source, spec: InputSpec
) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a job with its initial weights, and the arguments that make it again."""
    arguments = model_arguments(
        job.model,
        spec,
        len(source.classes),
        job.directions,
        job.training.drop_path,
        job.model_args,
    )
    model = build_model(job.model, arguments, job.pretrained)
    if job.directions is not None:
        # The file that named them may be gone when the checkpoint is read.
        arguments["directions"] = model_directions(model)
    if job.start_from is not None:
        start_from_supernet(model, load_checkpoint(job.start_from)[0])
    return model, arguments


def _callbacks(
    job: TrainingJob, history: History, title: str, console: Console | None
) -> list[Callback]:
    callbacks: list[Callback] = [history]
    if job.training.ema:
        callbacks.append(EMAWeightAveraging(decay=job.training.ema))
    if console is not None:
        callbacks.append(ProgressDisplay(title, console))
    return callbacks
