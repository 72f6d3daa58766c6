"""Evaluation of a trained classifier, and its predictions on image files."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from torch import nn

from localmamba.data import ImageSettings, Source, load_source, open_image
from localmamba.data.module import ImageData
from localmamba.data.transforms import eval_transform, normalize
from localmamba.tasks.callbacks import ProgressDisplay
from localmamba.tasks.checkpoints import Card
from localmamba.tasks.classification import Classification
from localmamba.tasks.settings import Hardware
from localmamba.tasks.trainer import make_trainer, quiet_lightning


def evaluate(trainer: Trainer, module: Classification, data: ImageData) -> dict[str, float]:
    """Returns metrics on the split that `data` evaluates; every process takes part.

    Returns:
        `accuracy`, `loss`, with many classes `top5`, and the number of `images`.
    """
    with quiet_lightning():
        (found,) = trainer.validate(module, datamodule=data, verbose=False)
    metrics = {name.removeprefix("val_"): float(value) for name, value in found.items()}
    return {**dict(sorted(metrics.items())), "images": len(data.dataset(data.evaluated))}


def evaluate_model(
    model: nn.Module, data: ImageData, hardware: Hardware, console: Console | None = None
) -> dict[str, float]:
    """Returns the metrics of a classifier, as `evaluate` does.

    Args:
        model: Images -> logits.
        data: Data set and split.
        hardware: Device and precision.
        console: Console of the progress; none if not given.
    """
    callbacks = [ProgressDisplay("evaluating", console)] if console is not None else []
    module = Classification(model, len(data.source.classes))
    with quiet_lightning():
        trainer = make_trainer(hardware, callbacks)
    return evaluate(trainer, module, data)


def load_evaluated(
    card: Card, data: str, settings: ImageSettings, split: str | None
) -> tuple[Source, str]:
    """Loads the data on which a checkpoint is to be evaluated.

    Args:
        card: Description of the checkpoint.
        data: Name or folder, as for a training.
        settings: Images and batches.
        split: A split by name. By default the held-out part; of a folder that is not split and that
            the model was not trained on, all of it.

    Raises:
        ValueError: If there is no such data or split, or its classes are others.
    """
    source = load_source(data, settings, card.classes)
    unseen = "all" in source.splits and source.name != card.data
    chosen = split or ("all" if unseen else source.final)
    source.split(chosen)
    return source, chosen


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
