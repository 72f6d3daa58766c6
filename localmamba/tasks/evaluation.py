"""What a trained classifier is worth, and what it says of an image."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
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


def evaluate_model(
    model: nn.Module, data: ImageData, hardware: Hardware, console: Console | None = None
) -> dict[str, float]:
    """Metrics of a classifier on the split that `data` evaluates.

    Args:
        model: Images -> logits.
        data: What to evaluate on.
        hardware: One device of it is used: several would count some images twice.
        console: Where progress is shown; nowhere if not given.

    Returns:
        `accuracy`, `loss`, with many classes `top5`, and the number of `images`.
    """
    module = Classification(model, len(data.source.classes))
    callbacks = [ProgressDisplay("evaluating", console)] if console is not None else []
    with quiet_lightning():
        trainer = make_trainer(hardware, callbacks)
        (found,) = trainer.validate(module, datamodule=data, verbose=False)
    metrics = {name.removeprefix("val_"): float(value) for name, value in found.items()}
    return {**dict(sorted(metrics.items())), "images": len(data.dataset(data.evaluated))}


def load_evaluated(
    card: Card, data: str, settings: ImageSettings, split: str | None
) -> tuple[Source, str]:
    """The data on which a checkpoint is to be evaluated.

    Args:
        card: Of the checkpoint.
        data: As for a training.
        settings: See there.
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
    """What a classifier says of one file.

    Attributes:
        path: The file.
        classes: The likeliest, best first.
        probabilities: Theirs.
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
        model: Of the checkpoint.
        card: Of the checkpoint.
        paths: Image files.
        device: Where to run.
        top: How many classes of each.
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
