"""Lightning's Trainer as this package uses it: quiet, and writing only what its callbacks write."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_only

from localmamba.tasks.processes import count_processes, find_launcher
from localmamba.tasks.settings import Hardware
from localmamba.tasks.sharding import ShardedStrategy
from localmamba.tasks.state import StateIO


def pick_device(name: str) -> torch.device:
    """Returns the device of this name; `auto` is a GPU if there is one.

    Raises:
        ValueError: If it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: PyTorch finds no GPU here; allowed: auto, cpu")
    return torch.device(name)


def is_main_process() -> bool:
    """Returns whether this process is the first of those that train together."""
    return getattr(rank_zero_only, "rank", 0) == 0


def cluster_environment() -> ClusterEnvironment:
    """Returns how Lightning finds the other processes."""
    launcher = find_launcher()
    if launcher == "torchrun":
        return TorchElasticEnvironment()
    if launcher == "srun":
        # Schedulers requeue by the exit code; Lightning would call scontrol.
        return SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment()


def make_trainer(
    hardware: Hardware,
    callbacks: Sequence[Callback] = (),
    epochs: int = 1,
    clip_grad: float | None = None,
    validates: bool = True,
) -> Trainer:
    """Makes a Trainer that shows and writes only what the callbacks do.

    Args:
        hardware: Device and precision; sets the number of threads of this process.
        callbacks: Callbacks of the Trainer.
        epochs: Epochs of a training.
        clip_grad: Largest norm of the gradient.
        validates: Whether every epoch ends with a validation.

    Raises:
        ValueError: If the hardware is not there or has no such precision.
    """
    device = pick_device(hardware.device)
    if device.type == "cpu" and hardware.precision == "16-mixed":
        raise ValueError("precision 16-mixed needs a GPU; allowed on a CPU: 32, bf16-mixed")
    devices, nodes = count_processes(hardware)
    if device.type == "cuda" and devices > torch.cuda.device_count():
        raise ValueError(f"devices {devices}: there are {torch.cuda.device_count()}")
    if hardware.threads is not None:
        torch.set_num_threads(hardware.threads)
    sharded = hardware.parallel == "fsdp"
    trainer = Trainer(
        strategy=ShardedStrategy(devices * nodes) if sharded else "auto",
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=devices,
        num_nodes=nodes,
        precision=hardware.precision,
        deterministic=hardware.deterministic,
        max_epochs=epochs,
        gradient_clip_val=clip_grad,
        callbacks=list(callbacks),
        plugins=[cluster_environment(), *([] if sharded else [StateIO()])],
        limit_val_batches=None if validates else 0,
        use_distributed_sampler=False,  # ImageData shares the images out
        logger=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    # Its handler of SIGTERM broadcasts wherever the processes are; `SaveState` handles signals.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silences Lightning's notes and advice, but no errors and no warnings of other packages."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        # A block returns views; nothing changes them in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
