"""Evaluation of a trained classifier, and its predictions on image files."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from torch import Tensor, nn

from localmamba.data import ImageSettings, Source, load_source, open_image
from localmamba.data.module import ImageData, ImageFiles
from localmamba.data.transforms import eval_transform, normalize
from localmamba.tasks.callbacks import ProgressDisplay
from localmamba.tasks.checkpoints import Card
from localmamba.tasks.classification import Classification
from localmamba.tasks.imagenet import class_names
from localmamba.tasks.settings import Hardware
from localmamba.tasks.trainer import make_trainer, quiet_lightning

TOP = 5
"""Classes kept for each image, at most."""


def evaluate(trainer: Trainer, module: Classification, data: ImageData) -> dict[str, float]:
    """Returns metrics on the split that `data` evaluates; every process takes part.

    Returns:
        `accuracy`, `loss`, with many classes `top5`, and the number of `images`.
    """
    with quiet_lightning():
        (found,) = trainer.validate(module, datamodule=data, verbose=False)
    metrics = {name.removeprefix("val_"): float(value) for name, value in found.items()}
    return {**dict(sorted(metrics.items())), "images": len(data.dataset(data.evaluated))}


@dataclass(frozen=True)
class Evaluation:
    """Predictions for labelled images, and how fast they were made.

    Attributes:
        classes: Class names.
        images: Paths of the images, or their numbers where there are no files.
        labels: Label of each image, [n].
        ranked: The likeliest classes of each image, best first, [n, k].
        confidence: Probability of the likeliest class, [n].
        losses: Cross entropy of each image, [n].
        rate: Images per second, from the start of the readers to the last metric.
        model_rate: Images per second of the forward passes alone, over all devices; without the
            first, which may compile kernels, if there are more.
    """

    classes: tuple[str, ...]
    images: Sequence[str]
    labels: np.ndarray
    ranked: np.ndarray
    confidence: np.ndarray
    losses: np.ndarray
    rate: float
    model_rate: float

    def metrics(self) -> dict[str, float]:
        """Returns accuracy, top-5 accuracy if there are more classes, loss, number of images."""
        hits = self.ranked == self.labels[:, None]
        top5 = {"top5": float(hits.any(1).mean())} if len(self.classes) > TOP else {}
        accuracy = float(hits[:, 0].mean())
        return {
            "accuracy": accuracy,
            **top5,
            "loss": float(self.losses.mean()),
            "images": len(hits),
        }

    def predictions(self) -> list[dict[str, Any]]:
        """Returns a row for each image: its class, the predicted one and its probability."""
        columns = (self.images, self.labels, self.ranked[:, 0], self.confidence)
        return [
            {
                "image": image,
                "class": self.classes[label],
                "predicted": self.classes[predicted],
                "probability": round(float(confidence), 6),
            }
            for image, label, predicted, confidence in zip(*columns, strict=True)
        ]

    def confusion(self) -> np.ndarray:
        """Returns the number of images of each class (row) and predicted class (column), [C, C]."""
        count = len(self.classes)
        cells = np.bincount(self.labels * count + self.ranked[:, 0], minlength=count * count)
        return cells.reshape(count, count)

    def per_class(self) -> list[dict[str, Any]]:
        """Returns a row for each class: images, recall, precision, F1, and its most frequent error.

        A ratio without a denominator is None.
        """
        matrix = self.confusion()
        right, of_class, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        errors = matrix - np.diag(right)
        worst = errors.argmax(1)

        def ratio(a: int, b: int) -> float | None:
            return round(a / b, 6) if b else None

        return [
            {
                "class": name,
                "images": int(of_class[i]),
                "recall": ratio(right[i], of_class[i]),
                "precision": ratio(right[i], predicted[i]),
                "f1": ratio(2 * right[i], of_class[i] + predicted[i]),
                "confused_with": self.classes[worst[i]] if errors[i, worst[i]] else None,
                "confused_images": int(errors[i, worst[i]]),
            }
            for i, name in enumerate(self.classes)
        ]


class _Recorder(Callback):
    """Keeps the likeliest classes of every image that is evaluated, and times the model."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._kept: list[tuple[Tensor, ...]] = []
        self._times: list[tuple[int, Any, Any]] = []
        self._start = 0.0
        self._before: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Starts the clock; files have been checked and no reader has started."""
        del trainer, pl_module, stage
        self._start = time.perf_counter()

    def on_validation_batch_start(self, _: Trainer, pl_module: LightningModule, *__: Any) -> None:
        """Starts the clock of a batch."""
        self._before = _now(pl_module.device)

    def on_validation_batch_end(
        self, _: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *__: Any
    ) -> None:
        """Keeps the likeliest classes, their probability and the loss, on their device."""
        self._times.append((len(outputs), self._before, _now(pl_module.device)))
        best = outputs.softmax(-1).topk(min(TOP, outputs.shape[-1]))
        loss = F.cross_entropy(outputs, batch[1], reduction="none")
        self._kept.append((best.indices, best.values[:, 0], loss))

    def on_validation_end(self, *_: Any) -> None:
        """Stops the clock."""
        self.seconds = time.perf_counter() - self._start

    def arrays(self) -> list[np.ndarray]:
        """Returns what was kept of this process's images."""
        return [torch.cat(parts).cpu().numpy() for parts in zip(*self._kept, strict=True)]

    def model_rate(self) -> float:
        """Returns images per second of the forward passes."""
        timed = self._times[1:] or self._times
        seconds = sum(_seconds(before, after) for _, before, after in timed)
        return sum(images for images, _, _ in timed) / seconds


def _now(device: torch.device) -> Any:
    """Returns a time of the device; on a GPU without waiting for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(before: Any, after: Any) -> float:
    return after - before if isinstance(after, float) else before.elapsed_time(after) / 1000


def evaluate_model(
    model: nn.Module, data: ImageData, hardware: Hardware, console: Console | None = None
) -> Evaluation:
    """Evaluates a classifier on the split that `data` evaluates; every process takes part.

    Args:
        model: Images -> logits.
        data: Data set and split.
        hardware: Devices and precision.
        console: Console of the progress; none if not given.

    Raises:
        ValueError: If the model puts out NaN or infinity, or an image that was checked cannot be
            read.
    """
    recorder = _Recorder()
    display = [ProgressDisplay("evaluating", console)] if console is not None else []
    module = Classification(model, len(data.source.classes))
    with quiet_lightning():
        trainer = make_trainer(hardware, [*display, recorder])
        trainer.validate(module, datamodule=data, verbose=False)
    dataset = data.dataset(data.evaluated)
    labels = np.asarray(dataset.labels)
    name = dataset.examples.name if isinstance(dataset, ImageFiles) else str
    positions = np.concatenate(data.share(np.arange(len(labels)))).astype(int)
    parts = _gather((positions, *recorder.arrays(), recorder.model_rate()))
    if missing := sum(len(part[0]) - len(part[1]) for part in parts):
        raise ValueError(f"{missing} images became unreadable during the evaluation")
    order = np.argsort(np.concatenate([part[0] for part in parts]))
    ranked, confidence, losses = (
        np.concatenate([part[i] for part in parts])[order] for i in (1, 2, 3)
    )
    if broken := int((~np.isfinite(losses)).sum()):
        raise ValueError(f"the model puts out NaN or infinity for {broken} of {len(order)} images")
    rates = len(order) / recorder.seconds, sum(part[-1] for part in parts)
    images = tuple(map(name, range(len(labels))))
    return Evaluation(data.source.classes, images, labels, ranked, confidence, losses, *rates)


def _gather(value: Any) -> list[Any]:
    """Returns the values of all processes, in their order."""
    if not torch.distributed.is_initialized():
        return [value]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def load_evaluated(
    card: Card, data: str, settings: ImageSettings, split: str | None
) -> tuple[Source, str]:
    """Loads the data on which a checkpoint is to be evaluated.

    Args:
        card: Description of the checkpoint.
        data: Name or folder, as for a training; the classes of ImageNet by WordNet id or number.
        settings: Images and batches.
        split: A split by name. By default the held-out part; of a folder that is not split and that
            the model was not trained on, all of it.

    Raises:
        ValueError: If there is no such data or split, or its classes are others.
    """
    source = _load_source(card, data, settings)
    unseen = "all" in source.splits and source.name != card.data
    chosen = split or ("all" if unseen else source.final)
    source.split(chosen)
    return source, chosen


def _load_source(card: Card, data: str, settings: ImageSettings) -> Source:
    """Loads data whose classes have one of the names that the model's may have."""
    errors = []
    for names in class_names(card.classes):
        try:
            return replace(load_source(data, settings, names), classes=card.classes)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


@dataclass(frozen=True)
class Prediction:
    """Prediction for one file.

    Attributes:
        path: The file.
        classes: The likeliest classes, best first.
        probabilities: Their probabilities.
        error: Why the file could not be read, if so.
    """

    path: Path
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str = ""


@torch.inference_mode()
def predict_files(
    model: nn.Module, card: Card, paths: Iterable[Path], device: torch.device, top: int = 5
) -> Iterator[Prediction]:
    """Classifies image files one by one; a file that cannot be read does not stop the others.

    Args:
        model: Model of the checkpoint.
        card: Its description.
        paths: Image files.
        device: Device of the model.
        top: Number of classes for each image.
    """
    transform = eval_transform(card.input)
    model = model.to(device).eval()
    for path in paths:
        try:
            image = transform(open_image(path))
        except ValueError as error:
            yield Prediction(path, error=str(error))
            continue
        logits = model(normalize(image[None].to(device), card.input))
        best = logits.float().softmax(-1)[0].topk(min(top, len(card.classes)))
        names = tuple(card.classes[i] for i in best.indices.tolist())
        yield Prediction(path, names, tuple(best.values.tolist()))
