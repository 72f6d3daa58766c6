"""A search for scan directions, from its job to the files of its run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import seed_everything
from rich.console import Console
from torch import nn

from localmamba.data import Source, check_trainable, load_source
from localmamba.data.module import ImageData
from localmamba.layers import DirectionalMixer
from localmamba.models.loading import build_model
from localmamba.search import Choice, make_strategy
from localmamba.tasks.building import input_spec, model_arguments
from localmamba.tasks.checkpoints import Card, save_checkpoint
from localmamba.tasks.run_folder import versions, write_json
from localmamba.tasks.search_data import SearchData
from localmamba.tasks.search_job import SearchJob
from localmamba.tasks.search_loop import SearchLoop
from localmamba.tasks.search_report import SearchReport
from localmamba.tasks.trainer import pick_device, quiet_lightning

SUPERNET, STATE = "supernet.safetensors", "state.pt"


@dataclass(frozen=True)
class Searched:
    """What a search came to.

    Attributes:
        choice: The directions, and how sure they are.
        history: [epochs, layers, C], probabilities after each epoch.
        figures: Entropy, seconds, memory.
    """

    choice: Choice
    history: np.ndarray
    figures: dict[str, Any]


class Search:
    """A search that is ready to start: data loaded and checked, supernet and strategy made.

    Args:
        job: What to search, on what and how.

    Raises:
        ValueError: If the job's parts are not there or do not fit together.
    """

    def __init__(self, job: SearchJob):
        self.job = job
        source = load_source(job.data, job.images)
        check_trainable(source)
        device = pick_device(job.hardware.device)
        if job.hardware.threads is not None:
            torch.set_num_threads(job.hardware.threads)
        torch.use_deterministic_algorithms(job.hardware.deterministic)
        with quiet_lightning():
            seed_everything(job.seed, workers=True, verbose=False)
        self.model, self.card = make_supernet(job, source)
        strategy = make_strategy(job.strategy, self.model, job.search, job.seed)
        images = ImageData(source, self.card.input, job.images, job.augmentation)
        kept_apart = job.search.choice_share if strategy.uses_holdout else 0.0
        self.loop = SearchLoop(
            self.model.to(device),
            strategy,
            SearchData(images, kept_apart, job.seed),
            job.training,
            job.seed,
            half=job.hardware.precision == "bf16-mixed",
        )

    def run(
        self,
        folder: Path,
        console: Console | None = None,
        title: str = "",
        resume: bool = False,
    ) -> Searched:
        """Trains the supernet and writes what it chooses, from the first epoch on.

        Args:
            folder: Gets directions.json, probabilities.csv and metrics.csv, anew after each epoch;
                in the end metrics.json and, if a final model can start from it,
                supernet.safetensors.
            console: Where progress is shown; nowhere if not given.
            title: Before the progress bar; the model's name by default.
            resume: Whether to go on after the last epoch that this search finished in that folder.

        Raises:
            ValueError: If the loss is no longer finite, or there is nothing to go on with.
        """
        loop = self.loop
        if resume:
            loop.load(folder / STATE)
        report = SearchReport(self.job, loop, folder, console, title or self.job.model)
        with report, quiet_lightning():
            while loop.progress.epoch < self.job.training.epochs:
                loop.train_epoch(report.step)
                loop.save(folder / STATE)
                report.write(loop.strategy.probabilities())
            choice = report.write(loop.conclude(report.choice))
        if loop.strategy.reusable:
            save_checkpoint(folder / SUPERNET, self.model, self.card)
        figures = report.figures(choice)
        write_json(folder / "metrics.json", {**figures, "made_with": versions()})
        (folder / STATE).unlink(missing_ok=True)
        return Searched(choice, np.array(loop.progress.history), figures)


def make_supernet(job: SearchJob, source: Source) -> tuple[nn.Module, Card]:
    """The supernet of a job with its initial weights, and what its checkpoint says."""
    spec = input_spec(job.model, job.images, source.channels)
    # A path of single_path is the final model itself: there is nothing to weigh directions with.
    others = {"search": job.strategy != "single_path", **job.model_args}
    arguments = model_arguments(
        job.model,
        spec,
        len(source.classes),
        list(job.candidates),
        job.training.drop_path,
        others,
    )
    model = build_model(job.model, arguments)
    if job.checkpointing:
        # Every supernet is one of this package's models, which have this.
        model.set_grad_checkpointing()  # type: ignore[operator]
    for mixer in model.modules():
        if isinstance(mixer, DirectionalMixer):
            mixer.at_once = job.at_once
    images = job.images
    card = Card(
        job.model, arguments, source.classes, spec, source.name, images.held_out, images.split_seed
    )
    return model, card
