"""A training, from its job to the files of its run; and what a search has in common with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from torch import nn

from localmamba.data import check_trainable, load_source
from localmamba.data.module import ImageData
from localmamba.models.directions import DirectionTable
from localmamba.models.loading import build_model
from localmamba.tasks.building import (
    input_spec,
    model_arguments,
    model_directions,
    start_from,
)
from localmamba.tasks.callbacks import History, Meter, ProgressDisplay
from localmamba.tasks.checkpoints import Card, save_checkpoint
from localmamba.tasks.classification import Classification
from localmamba.tasks.evaluation import evaluate
from localmamba.tasks.finite import FiniteCheck, describe_run
from localmamba.tasks.job import Job, TrainingJob
from localmamba.tasks.launch import check_launch
from localmamba.tasks.optimization import AverageWeights
from localmamba.tasks.processes import count_processes
from localmamba.tasks.run_folder import finish, write_config, write_json
from localmamba.tasks.sharding import ShardedStrategy, gather_state
from localmamba.tasks.state import SaveState, find_state, read_state
from localmamba.tasks.trainer import is_main_process, make_trainer, quiet_lightning

AnyJob = TypeVar("AnyJob", bound=Job)


class Run(Generic[AnyJob]):
    """A training or a search that is ready to start: data loaded and checked, model made.

    Args:
        job: Settings of the run.
        directions: Scan directions of the model, if it takes any.
        model_args: Further arguments of the model.
        pretrained: Whether to start from weights that timm fetches.

    Raises:
        ValueError: If the job's parts are not there or do not fit together.
    """

    command: ClassVar[str]
    """The command of the command line that runs it."""
    data: ImageData
    validates: ClassVar[bool] = True
    """Whether every epoch ends with a validation."""

    def __init__(
        self,
        job: AnyJob,
        directions: DirectionTable | None,
        model_args: dict[str, Any],
        pretrained: bool = False,
    ):
        self.job = job
        # Refused before anything is loaded.
        devices, nodes = count_processes(job.hardware)
        job.images.passes(devices * nodes)
        check_launch(job.hardware, devices * nodes)
        self.source = load_source(job.data, job.images)
        check_trainable(self.source)
        self.spec = input_spec(job.model, job.images, self.source.channels)
        with quiet_lightning():
            seed_everything(job.seed, workers=True, verbose=False)
        classes, drop_path = len(self.source.classes), job.training.drop_path
        self.arguments = model_arguments(
            job.model, self.spec, classes, directions, drop_path, model_args
        )
        self.model = build_model(job.model, self.arguments, pretrained)
        self.meter = Meter()
        self.history = History(self.meter)

    def image_data(self, choice_share: float = 0.0) -> ImageData:
        """Makes the training batches; bad image files are found here, before the training."""
        job = self.job
        data = ImageData(
            self.source, self.spec, job.images, job.augmentation, None, choice_share, job.seed
        )
        data.setup("fit")
        return data

    def note(self) -> str:
        """Returns a text to be shown after the figures of an epoch."""
        return ""

    def fit(
        self,
        folder: Path | None,
        console: Console | None,
        title: str,
        resume: bool,
        callbacks: Sequence[Callback],
    ) -> tuple[Trainer, Classification]:
        """Trains the model; arguments are those of `Training.run`."""
        job, settings = self.job, self.job.training
        state = None
        if resume:
            if folder is None:
                raise ValueError("resume needs the folder of the run")
            state = find_state(folder, job)
        if not is_main_process():
            folder = console = None
        if folder:
            self.history.path = folder / "metrics.csv"
            self.data.bad.path = folder / "bad_images.csv"
            write_config(folder, self.command, job.config())
        average = [AverageWeights(settings.ema)] if settings.ema else []
        display = []
        if console:
            display = [ProgressDisplay(title or job.model, console, self.note, self.meter)]
        saving = SaveState(folder, job, state)
        callbacks = [*average, *callbacks, self.meter, self.history, *display, saving]
        run = describe_run(job, self.arguments)
        finite = FiniteCheck(settings.skip_nonfinite, run, folder)
        module = Classification(
            self.model, len(self.source.classes), settings, job.augmentation, job.seed,
            job.hardware.launch, finite,
        )  # fmt: skip
        with quiet_lightning():
            seed_everything(job.seed, workers=True, verbose=False)
            trainer = make_trainer(
                job.hardware, callbacks, settings.epochs, settings.clip_grad, self.validates
            )
            trainer.accumulate_grad_batches, _ = job.images.passes(trainer.world_size)
            if state is not None and state.is_dir():
                # Lightning makes the loader, for the number of steps, before it reads such a state.
                self.data.trainer = trainer
                self.data.load_state_dict(read_state(state)[type(self.data).__qualname__])
            if folder:
                trainer.logger = TensorBoardLogger(folder, name="tensorboard", version="")
            trainer.fit(module, datamodule=self.data, ckpt_path=state)
            for callback in average:
                # Again, for a run that was stopped after its last epoch.
                callback.on_train_end(trainer, module)
        return trainer, module

    def card(self, metrics: dict[str, float]) -> Card:
        """Returns the description of the model for its checkpoint."""
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


@dataclass(frozen=True)
class Trained:
    """Result of a training.

    Attributes:
        model: The model, in evaluation mode.
        card: Its description, with the final metrics.
        directions: Scan directions of every block; empty for a model that has none.
        history: A row an epoch.
        split: Split of the final metrics.
    """

    model: nn.Module
    card: Card
    directions: list[list[str]]
    history: list[dict[str, float]]
    split: str

    def save(self, folder: Path) -> list[Path]:
        """Writes model.safetensors, metrics.json and, if there are any, directions.json."""
        paths = [folder / "model.safetensors"]
        save_checkpoint(paths[0], self.model, self.card)
        if self.directions:
            entry = {"model": self.card.model, "directions": self.directions}
            paths.append(write_json(folder / "directions.json", entry))
        return [*paths, finish(folder, {"split": self.split, **self.card.metrics})]


class Training(Run[TrainingJob]):
    """A training that is ready to start: data loaded and checked, model made.

    Args:
        job: Settings of the training.

    Raises:
        ValueError: If the job's parts are not there or do not fit together.
    """

    command = "train"

    def __init__(self, job: TrainingJob):
        fetched = job.pretrained and job.start_from is None
        super().__init__(job, job.directions, job.model_args, fetched)
        if job.directions is not None:
            # The file that named them may be gone when the checkpoint is read.
            self.arguments["directions"] = model_directions(self.model)
        if job.start_from is not None:
            start_from(self.model, job.start_from, job.model, self.arguments, self.spec.size)
        self.data = self.image_data()

    def run(
        self,
        folder: Path | None = None,
        console: Console | None = None,
        title: str = "",
        resume: bool = False,
        callbacks: Sequence[Callback] = (),
    ) -> Trained | None:
        """Trains, then evaluates the last weights on held-out images.

        Args:
            folder: Folder for config.yaml, metrics.csv and, until the result is saved, the state of
                the run. All processes but the first need it to resume only.
            console: Console of the progress; none if not given.
            title: Text before the progress bar; the model's name by default.
            resume: Whether to go on from the state in the folder, if there is one.
            callbacks: Further callbacks of Lightning.

        Returns:
            The result; None in all processes but the first.

        Raises:
            ValueError: If input or loss are not finite, or the state in the folder does not fit.
        """
        trainer, module = self.fit(folder, console, title, resume, callbacks)
        split = self.source.final
        held_out = ImageData(
            self.source, self.spec, self.job.images, evaluated=split, bad=self.data.bad
        )
        metrics = evaluate(trainer, module, held_out)
        sharded = isinstance(trainer.strategy, ShardedStrategy)
        state = gather_state(self.model) if sharded else {}
        if not is_main_process():
            return None
        if sharded:
            self.model = build_model(self.job.model, self.arguments)
            self.model.load_state_dict(state)
        directions = model_directions(self.model)
        return Trained(self.model.eval(), self.card(metrics), directions, self.history.rows, split)
