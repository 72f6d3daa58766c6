"""The epochs of a search: the supernet is trained, and what it would choose is written down."""

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import seed_everything
from torch import Tensor, nn

from localmamba.search import Strategy, search_step
from localmamba.tasks.classification import FiniteCheck, make_mixup
from localmamba.tasks.optimization import make_optimizer, make_schedule
from localmamba.tasks.search_data import Batch, SearchData
from localmamba.tasks.settings import TrainingSettings


@dataclass
class Progress:
    """How far a search is.

    Attributes:
        epoch: Epochs done.
        history: Probabilities after each, [layers][C].
        rows: Loss and seconds of each.
    """

    epoch: int
    history: list[list[list[float]]]
    rows: list[dict[str, float]]


class SearchLoop:
    """Trains a supernet as its strategy says.

    Everything that an epoch draws follows from the seed and its number, so that a search that went
    on after a stop comes to the very same directions.

    Args:
        model: The supernet, on its device.
        strategy: Made for it.
        data: Images of the search.
        settings: How the weights are trained.
        seed: Of augmentation and stochastic depth.
        half: Whether to run under autocast to bfloat16.
    """

    def __init__(
        self,
        model: nn.Module,
        strategy: Strategy,
        data: SearchData,
        settings: TrainingSettings,
        seed: int,
        half: bool = False,
    ):
        self.model, self.strategy, self.data = model, strategy, data
        self.settings, self.seed, self.half = settings, seed, half
        self.device = next(model.parameters()).device
        self.steps = settings.epochs * data.steps
        self.optimizer = make_optimizer(model, settings)
        self.schedule = make_schedule(self.optimizer, settings, self.steps)
        self.mixup = make_mixup(data.data.augmentation, len(data.data.source.classes))
        self.progress = Progress(0, [], [])

    def train_epoch(self, on_step: Callable[[], None] = lambda: None) -> None:
        """Trains one more epoch and notes what the strategy makes of it.

        Raises:
            ValueError: If the loss is no longer finite.
        """
        epoch, start = self.progress.epoch, time.perf_counter()
        seed_everything((self.seed * 1_000_003 + epoch) % 2**32, verbose=False)
        self.model.train()
        finite, losses = FiniteCheck(), []
        for step, (batch, held_out) in enumerate(self.data.epoch(epoch)):
            finite.raise_if_not(epoch)
            done = (epoch * self.data.steps + step) / self.steps
            loss = search_step(
                self.strategy, self.loss, self.optimizer, batch, held_out, done,
                self.settings.clip_grad,
            )  # fmt: skip
            finite.note(loss, loss)
            self.schedule.step()
            losses.append(loss)
            on_step()
        finite.raise_if_not(epoch)
        self.strategy.end_epoch()
        mean = float(torch.stack(losses).mean())
        row = {"epoch": epoch + 1, "train_loss": mean, "seconds": time.perf_counter() - start}
        self.progress.epoch += 1
        self.progress.rows.append(row)
        self.progress.history.append(self.strategy.probabilities().tolist())

    def loss(self, batch: Batch) -> Tensor:
        """The training loss of a batch of uint8 images."""
        images, targets = (x.to(self.device, non_blocking=True) for x in batch)
        images = self.data.data.augment(images)
        if self.mixup is not None:
            even = len(images) // 2 * 2  # timm mixes pairs
            images, targets = self.mixup(images[:even], targets[:even])
        with self._autocast():
            logits = self.model(images)
        return F.cross_entropy(
            logits.float(), targets, label_smoothing=self.settings.label_smoothing
        )

    def conclude(self, on_choice: Callable[[], None] = lambda: None) -> Tensor:
        """The final probabilities, [layers, C]; a strategy may try many choices for them."""
        judges: list[Batch] = []
        if self.strategy.uses_holdout:
            judges = [
                (images.to(self.device), labels.to(self.device))
                for images, labels in self.data.judges(self.strategy.settings.val_images)
            ]
        self.model.eval()

        @torch.no_grad()
        def held_out_loss() -> float:
            total = torch.zeros((), device=self.device)
            for images, labels in judges:
                with self._autocast():
                    logits = self.model(images)
                total += F.cross_entropy(logits.float(), labels, reduction="sum")
            on_choice()
            return float(total) / sum(len(labels) for _, labels in judges)

        return self.strategy.conclude(held_out_loss)

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16) if self.half else nullcontext()

    def save(self, path: Path) -> None:
        """Writes all that `load` needs to go on; a reader finds the old file or the new one."""
        state = {
            "progress": vars(self.progress),
            "model": self.model.state_dict(),
            "strategy": self.strategy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        draft = path.with_name(f".{path.name}.draft")
        torch.save(state, draft)
        os.replace(draft, path)

    def load(self, path: Path) -> None:
        """Goes on where `save` stopped.

        Raises:
            ValueError: If there is nothing to go on with, or it is of another search.
        """
        if not path.is_file():
            raise ValueError(f"nothing to resume: there is no {path}")
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.strategy.load_state_dict(state["strategy"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.progress = Progress(**state["progress"])
        except (RuntimeError, KeyError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise ValueError(f"{path} is of a search with other settings: {first}") from None
