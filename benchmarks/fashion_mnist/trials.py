"""Runs of the study on one device: training, search, measurement of cost."""

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from arms import KEEP, Arm, Setup
from torch import Tensor, nn

import localmamba  # noqa: F401 - registers the models
from localmamba.data import InputSpec
from localmamba.data.sources import FASHION_CLASSES
from localmamba.ops import CANDIDATES
from localmamba.search import SearchSettings, Strategy, entropy, make_strategy, search_step
from localmamba.tasks.checkpoints import Card, save_checkpoint
from localmamba.tasks.optimization import make_optimizer, make_schedule
from localmamba.tasks.settings import TrainingSettings

MODEL = "localvim_demo"
MEAN, STD = 0.2860, 0.3530
SHIFT = 2
"""Maximum shift of training images in pixels."""

EVAL_BATCH = 1024
WARM_UP_STEPS, TIMED_STEPS = 5, 20
"""Numbers of steps of a measurement of cost."""


class Data:
    """Fashion-MNIST as tensors on a device.

    Args:
        path: File of prepare.py.
        device: Device of the tensors.
        limit: Number of training images used.
    """

    def __init__(self, path: Path, device: torch.device, limit: int):
        arrays = np.load(path)
        self.device = device
        self.images, self.test_images = (
            torch.from_numpy(arrays[f"{split}_images"]).to(device)[:, None]
            for split in ("train", "test")
        )
        self.labels, self.test_labels = (
            torch.from_numpy(arrays[f"{split}_labels"]).to(device).long()
            for split in ("train", "test")
        )
        self.images, self.labels = self.images[:limit], self.labels[:limit]


def normalize(images: Tensor) -> Tensor:
    """Maps uint8 to float32 of mean 0 and deviation 1."""
    return (images.float() / 255 - MEAN) / STD


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flips half of the images and shifts all by up to `SHIFT` pixels: uint8 [B, 1, H, W]."""
    count, _, height, width = images.shape
    device = images.device
    padded = F.pad(images[:, 0], (SHIFT,) * 4)
    offset = torch.randint(0, 2 * SHIFT + 1, (2, count, 1), generator=generator, device=device)
    rows = offset[0] + torch.arange(height, device=device)
    columns = offset[1] + torch.arange(width, device=device)
    mirror = torch.rand(count, 1, generator=generator, device=device) < 0.5
    columns = torch.where(mirror, columns.flip(1), columns)
    picked = torch.arange(count, device=device)[:, None, None]
    return padded[picked, rows[:, :, None], columns[:, None, :]][:, None]


def batches(pool: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yields batches of indices from a pool without end, shuffled anew in each epoch."""
    size = min(size, len(pool))
    while True:
        order = pool[torch.randperm(len(pool), generator=generator, device=pool.device)]
        yield from order[: len(order) // size * size].split(size)


def make_model(setup: Setup, **arguments: object) -> tuple[nn.Module, dict]:
    """Creates the study's LocalVim; returns it with its arguments."""
    arguments = {
        "num_classes": 10,
        "in_chans": 1,
        "img_size": 28,
        "patch_size": setup.patch,
        "embed_dim": setup.width,
        "depth": setup.depth,
        "d_state": setup.states,
        **arguments,
    }
    return timm.create_model(MODEL, **arguments), arguments


class Trainer:
    """Training loop state of a model or a supernet.

    Args:
        model: Model on the device of the data.
        data: Images.
        setup: Sizes of the study.
        epochs: Number of epochs.
        seed: Seed of batches and augmentation.
        pool: Indices of the images that train weights.
    """

    def __init__(
        self, model: nn.Module, data: Data, setup: Setup, epochs: int, seed: int, pool: Tensor
    ):
        self.model, self.data, self.setup = model, data, setup
        self.generator = torch.Generator(data.device).manual_seed(seed)
        settings = TrainingSettings(
            epochs=epochs, lr=setup.lr, warmup_epochs=epochs / 10, weight_decay=setup.weight_decay
        )
        self.per_epoch = max(len(pool) // setup.batch, 1)
        self.total = epochs * self.per_epoch
        self.optimizer = make_optimizer(model, settings)
        self.schedule = make_schedule(self.optimizer, settings, self.total)
        self.batches = batches(pool, setup.batch, self.generator)

    def loss(self, indices: Tensor) -> Tensor:
        """Computes the loss of a batch of augmented training images."""
        images = normalize(augment(self.data.images[indices], self.generator))
        with torch.autocast(self.data.device.type, torch.bfloat16):
            logits = self.model(images)
        smoothing = self.setup.label_smoothing
        return F.cross_entropy(logits.float(), self.data.labels[indices], label_smoothing=smoothing)

    def step(self, indices: Tensor) -> None:
        """Trains on one batch."""
        self.optimizer.zero_grad()
        self.loss(indices).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Returns mean loss and accuracy on uint8 images."""
    model.eval()
    logits = []
    for part in images.split(EVAL_BATCH):
        with torch.autocast(images.device.type, torch.bfloat16):
            logits.append(model(normalize(part)).float())
    scores = torch.cat(logits)
    accuracy = (scores.argmax(1) == labels).float().mean()
    return float(F.cross_entropy(scores, labels)), float(accuracy)


def train(
    data: Data, setup: Setup, arm: Arm, table: list[list[str]], seed: int, save: Path | None = None
) -> dict:
    """Trains an arm and evaluates its last weights on the test images."""
    torch.manual_seed(seed)
    model, arguments = make_model(setup, directions=table, scattn=arm.scattn)
    model.to(data.device)
    pool = torch.arange(len(data.images), device=data.device)
    trainer = Trainer(model, data, setup, setup.epochs, seed, pool)
    start = time.perf_counter()
    for indices in islice(trainer.batches, trainer.total):
        trainer.step(indices)
    loss, accuracy = evaluate(model, data.test_images, data.test_labels)
    record = {
        "directions": table,
        "parameters": sum(p.numel() for p in model.parameters()),
        "test_loss": loss,
        "test_accuracy": accuracy,
        "seconds": time.perf_counter() - start,
    }
    if save is not None:
        spec = InputSpec(28, 1, (MEAN,), (STD,))
        metrics = {"loss": loss, "accuracy": accuracy}
        card = Card(MODEL, arguments, FASHION_CLASSES, spec, "fashion-mnist", metrics=metrics)
        save_checkpoint(save, model, card)
    return record


def prepare_search(
    data: Data, setup: Setup, strategy_name: str, seed: int
) -> tuple[Strategy, Trainer, Tensor]:
    """Creates a supernet; returns its strategy, trainer and held-out image indices."""
    torch.manual_seed(seed)
    model, _ = make_model(setup, directions=CANDIDATES)
    model.to(data.device)
    settings = SearchSettings(KEEP, population=setup.population, generations=setup.generations)
    strategy = make_strategy(strategy_name, model, settings, seed)
    apart = int(len(data.images) * settings.choice_share) if strategy.uses_holdout else 0
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(seed))
    held_out, pool = order.to(data.device).split([apart, len(order) - apart])
    trainer = Trainer(model.to(data.device), data, setup, setup.search_epochs, seed, pool)
    return strategy, trainer, held_out


def search_steps(
    strategy: Strategy, trainer: Trainer, held_out: Tensor, steps: int
) -> Iterator[None]:
    """Trains the supernet for `steps` steps, yielding after each."""
    val_batches = batches(held_out, trainer.setup.batch, trainer.generator)
    for done, indices in enumerate(islice(trainer.batches, steps)):
        batch = next(val_batches) if strategy.uses_holdout else None
        progress = done / steps
        search_step(strategy, trainer.loss, trainer.optimizer, indices, batch, progress, 1.0)
        trainer.schedule.step()
        yield


def search(data: Data, setup: Setup, strategy_name: str, seed: int) -> dict:
    """Searches directions; the record has the probabilities after every epoch."""
    start = time.perf_counter()
    strategy, trainer, held_out = prepare_search(data, setup, strategy_name, seed)
    history = []
    steps = search_steps(strategy, trainer, held_out, trainer.total)
    for done, _ in enumerate(steps, start=1):
        if done % trainer.per_epoch == 0:
            strategy.end_epoch()
            history.append(strategy.probabilities().tolist())
    chosen = held_out[: strategy.settings.val_images]
    val_batches = data.images[chosen], data.labels[chosen]
    trainer.model.eval()
    probabilities = strategy.conclude(lambda: evaluate(trainer.model, *val_batches)[0])
    return {
        "directions": strategy.directions(probabilities),
        "probabilities": probabilities.tolist(),
        "history": history,
        "entropy": float(np.mean(entropy(probabilities))),
        "seconds": time.perf_counter() - start,
    }


def cost(data: Data, setup: Setup, subject: Arm | str) -> dict:
    """Measures time per step and memory of an arm's training or a strategy's search.

    Alpha is trained in the later part of a search only; the measured steps train it.
    """
    gc.collect()
    before = torch.cuda.memory_allocated() if data.device.type == "cuda" else 0
    setup = replace(setup, batch=setup.cost_batch)
    if isinstance(subject, str):
        strategy, trainer, held_out = prepare_search(data, setup, subject, seed=0)
        strategy.settings = replace(strategy.settings, choice_warmup=0.0)
        running = search_steps(strategy, trainer, held_out, WARM_UP_STEPS + TIMED_STEPS)
        return measure(lambda: next(running), data.device, before)
    model, _ = make_model(setup, directions=list(subject.directions), scattn=subject.scattn)
    pool = torch.arange(len(data.images), device=data.device)
    trainer = Trainer(model.to(data.device), data, setup, setup.epochs, 0, pool)
    return measure(lambda: trainer.step(next(trainer.batches)), data.device, before)


def measure(step: Callable[[], object], device: torch.device, memory_before: int) -> dict:
    """Returns milliseconds per step and, on a GPU, the peak of allocated memory."""
    for _ in range(WARM_UP_STEPS):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(TIMED_STEPS):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    record: dict = {"milliseconds": (time.perf_counter() - start) / TIMED_STEPS * 1e3}
    if device.type == "cuda":
        record["memory_bytes"] = torch.cuda.max_memory_allocated() - memory_before
        torch.cuda.empty_cache()  # for runs in other processes
    return record
