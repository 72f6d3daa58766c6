"""`localmamba predict`: classifies image files with a checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich import box
from rich.progress import Progress
from rich.table import Table

if TYPE_CHECKING:
    from localmamba.tasks.evaluation import Prediction


def predict(
    images: list[Path],
    checkpoint: Path,
    top: int = 3,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> int:
    """Classifies image files with a checkpoint of `localmamba train`.

    Reports files that cannot be read and classifies the others; the exit code is then 2.

    Args:
        images: Image files.
        checkpoint: A model.safetensors.
        top: Number of classes shown per image.
        device: auto uses a GPU if there is one.

    Examples:
      localmamba predict new.jpg --checkpoint runs/train-localvim_tiny-PHOTOS/model.safetensors
      localmamba predict holidays/*.jpg --checkpoint model.safetensors --top 1
    """
    from localmamba.cli.reports import make_console
    from localmamba.tasks.checkpoints import load_checkpoint
    from localmamba.tasks.evaluation import predict_files
    from localmamba.tasks.trainer import pick_device

    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    model, card = load_checkpoint(checkpoint)
    errors = make_console(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        found = predict_files(model, card, images, pick_device(device), top)
        predictions = list(progress.track(found, total=len(images), description="predicting"))
    good = [prediction for prediction in predictions if not prediction.error]
    if good:
        make_console().print(_table(good))
    for prediction in predictions:
        if prediction.error:
            errors.print(f"localmamba predict: {prediction.error}", soft_wrap=True)
    return 0 if len(good) == len(predictions) else 2


def _table(predictions: "list[Prediction]") -> Table:
    table = Table(box=box.SIMPLE, show_edge=False)
    table.add_column("image", overflow="fold")
    for rank in range(len(predictions[0].classes)):
        table.add_column("class" if rank == 0 else f"{rank + 1}.", overflow="fold")
        table.add_column("%", justify="right", no_wrap=True)
    for prediction in predictions:
        ranked = zip(prediction.classes, prediction.probabilities, strict=True)
        cells = [cell for name, p in ranked for cell in (name, f"{100 * p:.1f}")]
        table.add_row(str(prediction.path), *cells)
    return table
