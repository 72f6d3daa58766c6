"""A training from its settings to its run folder, and the evaluation of what it made."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging
from rich.console import Console
from torch import nn

from localmamba.data import (
    Augmentation,
    ImageSettings,
    InputSpec,
    Source,
    check_trainable,
    load_source,
)
from localmamba.data.module import ImageData
from localmamba.models.directions import DirectionTable
from localmamba.search.reuse import start_from_supernet
from localmamba.tasks.building import (
    build_model,
    input_spec,
    model_arguments,
    model_directions,
)
from localmamba.tasks.callbacks import History, ProgressDisplay
from localmamba.tasks.checkpoints import Card, load_checkpoint, save_checkpoint
from localmamba.tasks.classification import Classification
from localmamba.tasks.run_folder import versions, write_json
from localmamba.tasks.settings import Hardware, TrainingSettings
from localmamba.tasks.trainer import make_trainer, quiet_lightning

CHECKPOINT = "model.safetensors"


@dataclass(frozen=True)
class TrainingJob:
    """Everything that decides what a training comes to.

    Attributes:
        data: `digits`, `fashion-mnist` or a folder.
        model: timm's name.
        directions: Of a Local model: a table, or a JSON file.
        model_args: Further arguments of the model.
        pretrained: Whether to start from weights that timm fetches.
        start_from: A checkpoint to start from, of the same model or of its supernet.
        seed: Of initial weights, order of images and augmentation.
        images: See there.
        augmentation: See there.
        training: See there.
        hardware: See there.
    """

    data: str
    model: str
    directions: DirectionTable | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    start_from: str | None = None
    seed: int = 0
    images: ImageSettings = field(default_factory=ImageSettings)
    augmentation: Augmentation = field(default_factory=Augmentation)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    hardware: Hardware = field(default_factory=Hardware)

    def config(self) -> dict[str, Any]:
        """One flat level, as the command line and its --config have it."""
        groups = ("images", "augmentation", "training", "hardware")
        own = {k: v for k, v in asdict(self).items() if k not in groups}
        return own | {k: v for group in groups for k, v in asdict(getattr(self, group)).items()}


@dataclass(frozen=True)
class Trained:
    """What a training came to.

    Attributes:
        model: In evaluation mode, on the CPU.
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


def train_classifier(
    job: TrainingJob, folder: Path | None = None, console: Console | None = None, title: str = ""
) -> Trained:
    """Trains a classifier and evaluates its last weights on held-out images.

    Args:
        job: What to train, on what and how.
        folder: Gets model.safetensors, directions.json, metrics.csv and metrics.json.
        console: Where progress is shown; nowhere if not given.
        title: Before the progress bar; the model's name by default.

    Raises:
        ValueError: If the job does not fit together or the loss is no longer finite.
    """
    source = load_source(job.data, job.images)
    check_trainable(source)
    spec = input_spec(job.model, job.images, source.channels)
    with quiet_lightning():
        seed_everything(job.seed, workers=True, verbose=False)
        model, arguments = make_model(job, source, spec)
        module = Classification(model, len(source.classes), job.training, job.augmentation)
        data = ImageData(source, spec, job.images, job.augmentation)
        data.setup("fit")
        history = History(folder / "metrics.csv" if folder else None)
        trainer = make_trainer(
            job.hardware,
            _callbacks(job, history, title or job.model, console),
            job.training.epochs,
            job.training.clip_grad,
        )
        trainer.fit(module, datamodule=data)
    images = job.images
    card = Card(
        job.model, arguments, source.classes, spec, source.name, images.held_out, images.split_seed
    )
    final = ImageData(source, spec, images, evaluated=source.final)
    alone = replace(job.hardware, devices=1)
    card = replace(card, metrics=evaluate_model(model, final, alone, console))
    trained = Trained(model, card, model_directions(model), history.rows, source.final)
    if folder is not None and trainer.is_global_zero:
        save_trained(trained, folder)
    return trained


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
        arguments["directions"] = model_directions(model)  # a file may be gone tomorrow
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


def evaluate_model(
    model: nn.Module,
    data: ImageData,
    hardware: Hardware,
    console: Console | None = None,
) -> dict[str, float]:
    """Metrics of a classifier on the split that `data` evaluates: loss, accuracy, top5, images."""
    module = Classification(model, len(data.source.classes))
    callbacks = [ProgressDisplay("evaluating", console)] if console is not None else []
    with quiet_lightning():
        trainer = make_trainer(hardware, callbacks)
        (found,) = trainer.validate(module, datamodule=data, verbose=False)
    metrics = {name.removeprefix("val_"): float(value) for name, value in found.items()}
    return metrics | {"images": len(data.dataset(data.evaluated))}


def save_trained(trained: Trained, folder: Path) -> None:
    """Writes model.safetensors, directions.json (if there are any) and metrics.json."""
    save_checkpoint(folder / CHECKPOINT, trained.model, trained.card)
    if trained.directions:
        entry = {"model": trained.card.model, "directions": trained.directions}
        write_json(folder / "directions.json", entry)
    write_json(
        folder / "metrics.json",
        {"split": trained.split, **trained.card.metrics, "made_with": versions()},
    )
