"""Image classification under Lightning."""

import time
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from timm.data import Mixup
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from localmamba.data import Augmentation
from localmamba.data.module import seed_generators
from localmamba.tasks.finite import FiniteCheck, seed_pass
from localmamba.tasks.launch import LAUNCHERS, Eager
from localmamba.tasks.optimization import make_optimizer, make_schedule
from localmamba.tasks.settings import TrainingSettings
from localmamba.tasks.sharding import ShardedStrategy, shard

MANY_CLASSES = 20
"""With more classes than this, top-5 accuracy is logged too."""


class Classification(LightningModule):
    """Trains and evaluates a classifier, or a supernet with the callback `SearchSteps`.

    Logs `train_loss`, `val_loss`, `val_accuracy` and, with many classes, `val_top5`, every epoch.

    Args:
        model: Images [B, C, H, W] -> logits [B, classes].
        num_classes: Number of classes.
        settings: Optimizer and schedule.
        augmentation: Mixup and CutMix of it are done here, since they mix the targets too.
        seed: Seed of augmentation, dropout and stochastic depth.
        launch: Launch of a training step's kernels, see `Hardware`.
        finite: What is done where a loss is not finite; by default a training stops.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        settings: TrainingSettings | None = None,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        launch: str = "eager",
        finite: FiniteCheck | None = None,
    ):
        super().__init__()
        self.model = model
        self.settings = settings or TrainingSettings()
        self.seed = seed
        self.launch = launch
        self.fetched = 0.0
        """When the loader gave the last batch; see `Meter`."""
        self.mixup = make_mixup(augmentation or Augmentation(), num_classes)
        # Part of the checkpoint, so that an epoch that is resumed has the mean of all its steps.
        self.train_loss = MeanMetric(nan_strategy="disable")
        self.train_loss.persistent(True)
        # Metrics of torchmetrics are exact over processes with batches of different sizes.
        self.val_loss = MeanMetric(nan_strategy="disable")
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.top5: MulticlassAccuracy | None = None
        if num_classes > MANY_CLASSES:
            self.top5 = MulticlassAccuracy(num_classes, top_k=5, average="micro")
        self.finite = finite or FiniteCheck()

    def configure_model(self) -> None:
        """Shards the model, if the strategy has it so."""
        if isinstance(self.trainer.strategy, ShardedStrategy):
            shard(self.model, self.trainer.strategy.device_mesh["data_parallel"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Saves the mean of the loss over all processes, not that of the first."""
        with self.train_loss.sync_context():
            for name in ("mean_value", "weight"):
                total = getattr(self.train_loss, name)
                checkpoint["state_dict"][f"train_loss.{name}"] = total / self.trainer.world_size

    def forward(self, images: Tensor) -> Tensor:
        """Returns the model's logits."""
        return self.model(images)

    def on_before_batch_transfer(
        self, batch: tuple[Tensor, ...], dataloader_idx: int
    ) -> tuple[Tensor, ...]:
        """Seeds the random numbers of a training step, in all processes and passes alike.

        A resumed training draws what it would have drawn, and no generator's state is saved.
        """
        del dataloader_idx
        self.fetched = time.perf_counter()
        if self.trainer.training:
            number = self.trainer.fit_loop.total_batch_idx + 1
            seed_generators(self.seed, number // self.trainer.accumulate_grad_batches)
        return batch

    def on_train_batch_start(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        """Seeds again, so that augmentation need not be repeated to repeat a pass.

        Mixup is the same in all processes and passes of a step; dropout and stochastic depth are
        drawn for the images of one pass.
        """
        del batch, batch_idx
        number = self.trainer.fit_loop.total_batch_idx
        step = number // self.trainer.accumulate_grad_batches
        self._seeds = [[self.seed, step, 1], [self.seed, number, 1 + self.global_rank]]
        seed_pass(self._seeds)

    def mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Returns images and targets, mixed by mixup or CutMix if so set."""
        if self.mixup is not None:
            # timm mixes pairs, in place: an odd image is left out.
            even = len(images) // 2 * 2
            images, targets = self.mixup(images[:even].clone(), targets[:even])
        return images, targets

    def loss(self, images: Tensor, targets: Tensor, launcher: Eager | None = None) -> Tensor:
        """Returns the cross entropy of mixed images; the training stops if it is not finite."""
        launcher = launcher or Eager(self.model, self.cross_entropy)
        loss = launcher.forward(*self.mix(images, targets), self.trainer)
        where = f"epoch {self.current_epoch + 1}, step {self.trainer.fit_loop.batch_idx + 1}"
        self.finite.note(images, targets, loss, where, self._seeds)
        return loss

    def cross_entropy(
        self, model: Callable[[Tensor], Tensor], images: Tensor, targets: Tensor
    ) -> Tensor:
        """Returns the cross entropy, with label smoothing."""
        smoothing = self.settings.label_smoothing
        return F.cross_entropy(model(images).float(), targets, label_smoothing=smoothing)

    def on_train_start(self) -> None:
        """Makes the launcher, after callbacks have copied this module."""
        self.launcher = LAUNCHERS[self.launch](self.model, self.cross_entropy)

    def on_train_end(self) -> None:
        """Frees the memory of a CUDA graph."""
        del self.launcher

    def backward(self, loss: Tensor) -> None:
        """Computes gradients; the launcher has them already, or not."""
        self.launcher.backward(loss, self.trainer)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Returns the loss of the batch; `SearchSteps` has use for what follows the labels."""
        if batch_idx == 0:
            self.train_loss.reset()
        loss = self.loss(batch[0], batch[1], self.launcher)
        if not self.finite.skip or loss.isfinite():
            self.train_loss.update(loss.detach())
        self.log("train_loss", self.train_loss, on_step=False, on_epoch=True)
        return loss

    def configure_callbacks(self) -> list[Callback]:
        """Returns the check of the losses."""
        return [self.finite]

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Logs accuracy, and the loss without label smoothing; returns the logits."""
        del batch_idx
        images, labels = batch
        logits = self.model(images).float()
        # An update with a weight ignores it (torchmetrics 1.9, nan_strategy "disable").
        self.val_loss.update(F.cross_entropy(logits, labels, reduction="none"))
        self.log("val_loss", self.val_loss)
        for name, metric in (("val_accuracy", self.accuracy), ("val_top5", self.top5)):
            if metric is not None:
                metric.update(logits, labels)
                self.log(name, metric)
        return logits

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Returns AdamW and a schedule that moves every step."""
        optimizer = make_optimizer(self.model, self.settings)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = make_schedule(optimizer, self.settings, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def make_mixup(augmentation: Augmentation, num_classes: int) -> Mixup | None:
    """Makes timm's mixup and CutMix; None if neither is asked for."""
    if not (augmentation.mixup or augmentation.cutmix):
        return None
    return Mixup(
        mixup_alpha=augmentation.mixup,
        cutmix_alpha=augmentation.cutmix,
        label_smoothing=0.0,  # the loss does it
        num_classes=num_classes,
    )
