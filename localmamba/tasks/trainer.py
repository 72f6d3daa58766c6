"""Lightning's Trainer as this package uses it: quiet, seeded, without files of its own."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_only

from localmamba.tasks.settings import Hardware


def pick_device(name: str) -> torch.device:
    """The device of this name; `auto` is a GPU if there is one.

    Raises:
        ValueError: If it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: PyTorch finds no GPU here; allowed: auto, cpu")
    return torch.device(name)


def is_main_process() -> bool:
    """Whether this process is the first of those that train together."""
    return getattr(rank_zero_only, "rank", 0) == 0


def make_trainer(
    hardware: Hardware,
    callbacks: Sequence[Callback] = (),
    epochs: int = 1,
    clip_grad: float | None = None,
) -> Trainer:
    """A Trainer that shows and writes only what the callbacks do.

    Args:
        hardware: Where it runs; sets the number of threads of this process.
        callbacks: See there.
        epochs: Of a training.
        clip_grad: Largest norm of the gradient.

    Raises:
        ValueError: If the hardware is not there or has no such precision.
    """
    device = pick_device(hardware.device)
    if device.type == "cpu" and hardware.precision == "16-mixed":
        raise ValueError("precision 16-mixed needs a GPU; allowed on a CPU: 32, bf16-mixed")
    if device.type == "cuda" and hardware.devices > torch.cuda.device_count():
        raise ValueError(f"devices {hardware.devices}: there are {torch.cuda.device_count()}")
    if hardware.threads is not None:
        torch.set_num_threads(hardware.threads)
    return Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=hardware.devices,
        precision=hardware.precision,
        deterministic=hardware.deterministic,
        max_epochs=epochs,
        gradient_clip_val=clip_grad,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silences Lightning's notes and advice; errors and other packages' warnings still come."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
