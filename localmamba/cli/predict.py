"""`localmamba predict`: what a checkpoint says of image files."""

from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table


def predict(
    images: list[Path],
    checkpoint: Path,
    top: int = 3,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> int:
    """Classifies image files with a checkpoint of `localmamba train`.

    Files that cannot be read are named, the others are classified all the same; the exit code is
    then 2.

    Args:
        images: Image files.
        checkpoint: A model.safetensors.
        top: How many classes of each image are shown.
        device: auto takes a GPU if there is one.

    Examples:
      localmamba predict new.jpg --checkpoint runs/train-localvim_tiny-PHOTOS/model.safetensors
      localmamba predict holidays/*.jpg --checkpoint model.safetensors --top 1
    """
    from localmamba.tasks.checkpoints import load_checkpoint
    from localmamba.tasks.evaluation import Prediction, predict_files
    from localmamba.tasks.trainer import pick_device

    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    model, card = load_checkpoint(checkpoint)
    console, errors = Console(), Console(stderr=True)
    predictions: list[Prediction] = []
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        found = predict_files(model, card, images, pick_device(device), top)
        predictions.extend(progress.track(found, total=len(images), description="predicting"))
    good = [prediction for prediction in predictions if not prediction.error]
    if good:
        console.print(_table(good))
    for prediction in predictions:
        if prediction.error:
            errors.print(f"localmamba predict: {prediction.error}", highlight=False, soft_wrap=True)
    return 0 if len(good) == len(predictions) else 2


def _table(predictions: list) -> Table:
    table = Table(box=box.SIMPLE, show_edge=False)
    table.add_column("image", overflow="fold")
    for rank in range(len(predictions[0].classes)):
        table.add_column("class" if rank == 0 else f"{rank + 1}.", overflow="fold")
        table.add_column("%", justify="right", no_wrap=True)
    for prediction in predictions:
        cells = [
            cell
            for name, share in zip(prediction.classes, prediction.probabilities, strict=True)
            for cell in (name, f"{100 * share:.1f}")
        ]
        table.add_row(str(prediction.path), *cells)
    return table
