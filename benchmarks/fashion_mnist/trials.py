"""Trials of the study: data, a training step as a CUDA graph, training, search, evaluation.

A trial is a generator that yields after each step, so that a process can take turns among several
models: each has its own CUDA stream, and their graphs run at the same time on one GPU.
"""

import time
from collections.abc import Generator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from arms import ARMS, KEEP, Setup, Trial, random_directions
from torch import Tensor, nn

import localmamba  # noqa: F401 - registers the models
from localmamba.data import Augmentation, InputSpec, stratified_split
from localmamba.data.transforms import BatchAugmentation, normalize
from localmamba.ops import CANDIDATES
from localmamba.search import SearchSettings, entropy, make_strategy
from localmamba.tasks.optimization import make_optimizer, rate_at
from localmamba.tasks.settings import TrainingSettings

MODEL = "localvim_demo"
STATES = 16
"""States of a channel, as in the paper."""
AUGMENTATION = Augmentation(hflip=0.5, shift=0.08)
HELD_OUT = 0.2
"""Share of the images of a class that are held out, where the data has no test images."""
EVAL_BATCH = 1000
EAGER_STEPS = 3
"""Steps before the graph is captured: kernels are compiled, the optimizer makes its state."""

Split = tuple[Tensor, Tensor]
Steps = Generator[None, None, Any]
"""Yields after each step; returns the result."""


@lru_cache(maxsize=2)
def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads a file of prepare.py."""
    return dict(np.load(path))


class Data:
    """A data set as tensors on a device.

    Args:
        path: File of prepare.py.
        seed: Seed of the split, where the file has no test images.
        limit: Training images used, at most.
        device: Device of the tensors.

    Attributes:
        spec: Input of a model.
        train: Images uint8 [n, 1, H, W] and labels [n].
        test: The same of the test images.
    """

    def __init__(self, path: Path, seed: int, limit: int, device: torch.device):
        arrays = read_arrays(path)
        if "images" in arrays:
            parts = stratified_split(arrays["labels"], HELD_OUT, seed)
            pairs = [(arrays["images"][part], arrays["labels"][part]) for part in parts]
        else:
            pairs = [(arrays[f"{s}_images"], arrays[f"{s}_labels"]) for s in ("train", "test")]
        images, labels = pairs[0]
        pairs[0] = images[:limit], labels[:limit]
        mean, std = images.mean() / 255, images.std() / 255
        self.spec = InputSpec(images.shape[1], 1, (float(mean),), (float(std),))
        self.classes = int(labels.max()) + 1
        self.train, self.test = (
            (torch.from_numpy(x).to(device)[:, None], torch.from_numpy(y).to(device).long())
            for x, y in pairs
        )


def make_model(setup: Setup, data: Data, seed: int, **arguments: Any) -> nn.Module:
    """Creates the study's LocalVim on the CPU, so that a seed gives the same on every device."""
    torch.manual_seed(seed)
    return timm.create_model(
        MODEL,
        num_classes=data.classes,
        in_chans=1,
        img_size=data.spec.size,
        patch_size=setup.patch,
        embed_dim=setup.width,
        depth=setup.depth,
        d_state=STATES,
        **arguments,
    )


class Step:
    """A training step, on a GPU replayed as one CUDA graph after a few eager steps.

    Args:
        model: The model, on its device.
        settings: Optimizer and schedule.
        batch: A batch of images, whose shape and device all have.
        graph: Whether to capture a graph.

    Attributes:
        total: Sum of the losses.
    """

    def __init__(self, model: nn.Module, settings: TrainingSettings, batch: Tensor, graph: bool):
        self.model, self.settings = model, settings
        self.images = torch.empty_like(batch)
        self.labels = torch.empty(len(batch), dtype=torch.long, device=batch.device)
        self.total = torch.zeros((), device=batch.device)
        self.rate = torch.zeros((), device=batch.device)
        self.optimizer = make_optimizer(model, settings)
        for group in self.optimizer.param_groups:
            # A graph reads the rate from memory, and counts the steps on the device.
            group.update(lr=self.rate, fused=True, capturable=graph)
        self.eager_steps = EAGER_STEPS if graph else -1
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, images: Tensor, labels: Tensor, progress: float) -> None:
        """Trains on a batch, when this share of the training is done."""
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.rate.fill_(rate_at(progress, self.settings))
        if self.eager_steps == 0 and self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
                self.train()
        if self.graph is not None:
            self.graph.replay()
        else:
            self.train()
            self.eager_steps -= 1

    def train(self) -> None:
        """Forward and backward pass and optimizer step on the images that are there."""
        with torch.autocast(self.images.device.type, torch.bfloat16):
            logits = self.model(self.images)
        smoothing = self.settings.label_smoothing
        loss = F.cross_entropy(logits.float(), self.labels, label_smoothing=smoothing)
        loss.backward()
        assert self.settings.clip_grad is not None
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.total += loss.detach()


def fit(model: nn.Module, data: Data, setup: Setup, epochs: int, seed: int, graph: bool) -> Steps:
    """Trains a model; returns the mean loss of every epoch."""
    settings = TrainingSettings(
        epochs=epochs, lr=setup.lr, warmup_epochs=epochs / 10, clip_grad=1.0
    )
    images, labels = data.train
    batch = min(setup.batch, len(labels))
    per_epoch = len(labels) // batch
    augment = BatchAugmentation(data.spec, AUGMENTATION)
    step = Step(model.train(), settings, augment(images[:batch]), graph)
    losses = []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(labels))
        chosen = torch.from_numpy(order).to(labels.device).split(batch)
        for i in range(per_epoch):
            done = epoch * per_epoch + i
            # The generator is shared with the models that are trained at the same time.
            torch.manual_seed(seed * 1_000_003 + done)
            step(augment(images[chosen[i]]), labels[chosen[i]], done / (epochs * per_epoch))
            yield
        losses.append(step.total / per_epoch)
        step.total.zero_()
    return torch.stack(losses).tolist()


@torch.inference_mode()
def evaluate(model: nn.Module, data: Data) -> tuple[float, float]:
    """Returns cross entropy and accuracy on the test images."""
    images, labels = data.test
    logits = []
    with torch.autocast(images.device.type, torch.bfloat16):
        for part in images.split(EVAL_BATCH):
            logits.append(model.eval()(normalize(part, data.spec)).float())
    scores = torch.cat(logits)
    accuracy = (scores.argmax(1) == labels).float().mean()
    return float(F.cross_entropy(scores, labels)), float(accuracy)


def search(data: Data, setup: Setup, seed: int, graph: bool) -> Steps:
    """Runs the paper's search; returns directions, probabilities and entropy.

    Its strategy trains alpha with the weights and draws nothing, so a step is a training step.
    """
    start = time.perf_counter()
    model = make_model(setup, data, seed, directions=CANDIDATES)
    strategy = make_strategy("softmax", model, SearchSettings(keep=KEEP), seed)
    model.to(data.train[0].device)
    losses = yield from fit(model, data, setup, setup.search_epochs, seed, graph)
    probabilities = strategy.probabilities()
    return {
        "directions": strategy.directions(probabilities),
        "probabilities": probabilities.tolist(),
        "entropy": float(np.mean(entropy(probabilities))),
        "losses": losses,
        "seconds": time.perf_counter() - start,
    }


def run(trial: Trial, setup: Setup, folder: Path, device: torch.device, graph: bool) -> Steps:
    """Runs a trial; returns its record.

    Raises:
        ValueError: If the loss is not finite.
    """
    start = time.perf_counter()
    data = Data(folder / f"{trial.data}.npz", trial.seed, setup.images, device)
    arm, found = ARMS[trial.arm], None
    if trial.arm == "searched":
        found = yield from search(data, setup, trial.seed, graph)
        directions = found["directions"]
    elif trial.arm == "random":
        directions = random_directions(setup.depth, trial.seed)
    else:
        directions = [list(arm.directions)] * setup.depth
    model = make_model(setup, data, trial.seed, directions=directions, scattn=arm.scattn)
    model.to(device)
    losses = yield from fit(model, data, setup, setup.epochs, trial.seed, graph)
    loss, accuracy = evaluate(model, data)
    if not np.isfinite([*losses, loss]).all():
        raise ValueError(f"{trial}: the loss is not finite: {losses}")
    return {
        "accuracy": accuracy,
        "test_loss": loss,
        "losses": losses,
        "directions": directions,
        "search": found,
        "parameters": sum(p.numel() for p in model.parameters()),
        "images": [len(data.train[1]), len(data.test[1])],
        "seconds": time.perf_counter() - start,
        "ended": time.time(),
    }
