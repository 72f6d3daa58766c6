"""Optimizer, learning rate schedule, average of the weights."""

import math

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from localmamba.tasks.settings import TrainingSettings


def make_optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    """Makes AdamW without weight decay on biases, norms and `model.no_weight_decay()`."""
    from timm.optim import create_optimizer_v2

    optimizer = create_optimizer_v2(
        model,
        opt="adamw",
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        layer_decay=settings.layer_decay if settings.layer_decay < 1 else None,
        betas=settings.betas,
    )
    for group in optimizer.param_groups:  # timm leaves the factors to its own schedules
        group["lr"] *= group.get("lr_scale", 1.0)
    return optimizer


def rate_at(progress: float, settings: TrainingSettings) -> float:
    """Returns the learning rate when this share of the training is done."""
    warmup = settings.warmup_epochs / settings.epochs
    if progress < warmup:
        return settings.warmup_lr + (settings.lr - settings.warmup_lr) * progress / warmup
    cosine = (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2
    return settings.min_lr + (settings.lr - settings.min_lr) * cosine


def make_schedule(
    optimizer: torch.optim.Optimizer, settings: TrainingSettings, steps: int
) -> LambdaLR:
    """Makes the schedule `rate_at` of a training of so many steps."""
    return LambdaLR(optimizer, lambda step: rate_at(min(step / steps, 1), settings) / settings.lr)


def ends_step(trainer: Trainer, batch_idx: int) -> bool:
    """Returns whether the optimizer steps after this batch of an epoch, which has whole steps."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


class AverageWeights(WeightAveraging):
    """Lightning's exponential average of the weights, which a GPU updates without being waited for.

    Lightning makes the copy before the model is on the GPU, so that each step would copy the
    weights to the CPU, and its own exponential average goes over the parameters one by one.

    Args:
        decay: Decay of the average.
    """

    def __init__(self, decay: float):
        super().__init__(multi_avg_fn=get_ema_multi_avg_fn(decay))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes the copy, on the device of the training."""
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:
            # It is compared with 0 in every step.
            self._average_model.n_averaged = self._average_model.n_averaged.cpu()
