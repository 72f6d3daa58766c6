"""Optimizer and learning rate schedule."""

import math

import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

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
