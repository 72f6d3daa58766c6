"""Image classification under Lightning."""

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from timm.data import Mixup
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from localmamba.data import Augmentation
from localmamba.tasks.optimization import make_optimizer, make_schedule
from localmamba.tasks.settings import TrainingSettings

Batch = tuple[Tensor, Tensor]

MANY_CLASSES = 20
"""With more classes than this, the share of images with the truth among the five likeliest says
something."""


class Classification(LightningModule):
    """Trains and evaluates a classifier.

    Logs `train_loss`, `val_loss`, `val_accuracy` and, with many classes, `val_top5`, every epoch.

    Args:
        model: Images [B, C, H, W] -> logits [B, classes].
        num_classes: Number of classes.
        settings: Of the training.
        augmentation: Its mixup and CutMix are done here, since they mix the targets too.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        settings: TrainingSettings | None = None,
        augmentation: Augmentation | None = None,
    ):
        super().__init__()
        self.model = model
        self.settings = settings or TrainingSettings()
        self.mixup = make_mixup(augmentation or Augmentation(), num_classes)
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.top5: MulticlassAccuracy | None = None
        if num_classes > MANY_CLASSES:
            self.top5 = MulticlassAccuracy(num_classes, top_k=5, average="micro")
        self.finite = FiniteCheck()

    def forward(self, images: Tensor) -> Tensor:
        """The model's logits."""
        return self.model(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross entropy, on mixed images and targets if so set."""
        del batch_idx
        self.finite.raise_if_not(self.current_epoch)
        images, targets = batch
        if self.mixup is not None:
            # timm mixes pairs, so an odd image has no part in it.
            even = len(images) // 2 * 2
            images, targets = self.mixup(images[:even], targets[:even])
        loss = F.cross_entropy(
            self.model(images).float(), targets, label_smoothing=self.settings.label_smoothing
        )
        self.finite.note(images, loss)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(images))
        return loss

    def on_train_epoch_end(self) -> None:
        """The last step's check."""
        self.finite.raise_if_not(self.current_epoch)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss without smoothing, accuracy."""
        del batch_idx
        images, labels = batch
        logits = self.model(images).float()
        metrics: dict[str, Any] = {"val_loss": F.cross_entropy(logits, labels)}
        self.accuracy(logits, labels)
        metrics["val_accuracy"] = self.accuracy
        if self.top5 is not None:
            self.top5(logits, labels)
            metrics["val_top5"] = self.top5
        self.log_dict(metrics, on_epoch=True, on_step=False, batch_size=len(images))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW and a schedule that moves every step."""
        optimizer = make_optimizer(self.model, self.settings)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = make_schedule(optimizer, self.settings, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class FiniteCheck:
    """Stops a training that has met NaN or infinity, without making a GPU wait.

    The flags of a step are read when the next one starts, when they have long been computed.
    """

    def __init__(self) -> None:
        self._flags: Tensor | None = None

    def note(self, images: Tensor, loss: Tensor) -> None:
        """Computes the flags of this step, on its device."""
        self._flags = torch.stack([images.isfinite().all(), loss.detach().isfinite().all()])

    def raise_if_not(self, epoch: int) -> None:
        """ValueError that says whether the images or the loss of the step noted were not finite."""
        flags, self._flags = self._flags, None
        if flags is None:
            return
        images, loss = flags.tolist()
        if not images:
            raise ValueError(f"the input holds NaN or infinity (epoch {epoch + 1})")
        if not loss:
            raise ValueError(
                f"the loss is no longer finite (epoch {epoch + 1}); try a smaller lr, clip_grad 1 "
                "or precision 32"
            )


def make_mixup(augmentation: Augmentation, num_classes: int) -> Mixup | None:
    """timm's mixup and CutMix, or None if neither is asked for."""
    if not (augmentation.mixup or augmentation.cutmix):
        return None
    return Mixup(
        mixup_alpha=augmentation.mixup,
        cutmix_alpha=augmentation.cutmix,
        label_smoothing=0.0,  # the loss does it
        num_classes=num_classes,
    )
