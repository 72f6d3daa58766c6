"""`localmamba evaluate`: metrics of a checkpoint on labelled images."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.table import Table

from localmamba.tasks.settings import Hardware

if TYPE_CHECKING:
    from torch import nn

    from localmamba.tasks.checkpoints import Card

WORST = 10
"""Classes printed, at most."""


def evaluate(
    data: str,
    hardware: Hardware,
    checkpoint: Path | None = None,
    released: Path | None = None,
    model: str | None = None,
    split: Literal["train", "val", "test", "all"] | None = None,
    real: str | None = None,
    batch_size: int = 128,
    workers: int | None = None,
    bad_images: Literal["error", "skip", "unchecked"] = "error",
    data_root: str = "~/.cache/localmamba",
    output: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Evaluates a checkpoint on labelled images.

    Prints accuracy, the classes with the lowest recall, and images per second. Leaves a folder with
    metrics.json, classes.csv (recall, precision, F1 and the most frequent error of each class),
    predictions.csv (a row an image) and the confusion matrix as a picture.

    Args:
        data: digits, fashion-mnist, a folder of images, hfds/FOLDER or wds/FOLDER, as for train.
            Its classes must be among the model's; those of ImageNet may be called by WordNet id or,
            as in ImageNet-V2, by number.
        hardware: Devices and precision.
        checkpoint: A model.safetensors of `localmamba train`, which names its model itself.
        released: A published ImageNet checkpoint of LocalMamba, Vim or VMamba instead; needs
            --model.
        model: timm's name of the released model.
        split: Part of the data. By default the held-out part (test, else val); of a folder that is
            not split and that the model was not trained on, all of it.
        real: Also evaluates on reassessed labels of ImageNet's validation images (ImageNet-ReaL): a
            real.json, or timm for the copy that timm brings.
        batch_size: Images in a batch.
        workers: Processes that read image files; one a core, at most 8, if not given.
        bad_images: Stop at images that cannot be read, leave them out, or do not look for them.
        data_root: Folder of Fashion-MNIST.
        output: Folder of the results; runs/evaluate-MODEL-DATA by default, numbered if that is
            taken.
        overwrite: Whether the output folder may hold files; those of the same name are replaced.

    Examples:
      localmamba evaluate --checkpoint runs/x/model.safetensors --data digits
      localmamba evaluate --checkpoint model.safetensors --data NEW_PHOTOS --output results
      localmamba evaluate --released vim.pth --model vim_tiny --data IMAGENET --real timm
    """
    from localmamba.cli.reports import make_console, print_paths, print_results
    from localmamba.data import ImageSettings
    from localmamba.data.module import ImageData
    from localmamba.figures.confusion import draw_confusion
    from localmamba.figures.style import save_figure
    from localmamba.tasks.evaluation import evaluate_model, load_evaluated
    from localmamba.tasks.imagenet import RealLabels, describe
    from localmamba.tasks.run_folder import make_run_folder, versions, write_csv, write_json
    from localmamba.tasks.trainer import is_main_process

    classifier, card = _load(checkpoint, released, model)
    labels = RealLabels(real, card.classes) if real is not None else None
    settings = ImageSettings(
        batch_size=batch_size,
        workers=workers,
        bad_images=bad_images,
        data_root=data_root,
        held_out=card.held_out,
        split_seed=card.split_seed,
    )
    source, chosen = load_evaluated(card, data, settings, split)
    images = ImageData(source, card.input, settings, evaluated=chosen)
    images.setup("validate")
    if not is_main_process():
        evaluate_model(classifier, images, hardware)
        return
    folder = make_run_folder(output, f"evaluate-{card.model}-{Path(data).name}", overwrite)
    images.bad.path = folder / "bad_images.csv"
    console = make_console()
    found = evaluate_model(classifier, images, hardware, console)
    metrics = found.metrics()
    if labels is not None:
        metrics |= labels.metrics(found.images, found.ranked)
    settings_used = {
        "checkpoint": checkpoint or released, "model": card.model, "data": data, "split": chosen,
        "precision": hardware.precision, "devices": hardware.devices,
    }  # fmt: skip
    rates = {"images_per_second": found.rate, "model_images_per_second": found.model_rate}
    content = {**settings_used, **metrics, **rates, "made_with": versions()}
    classes, title = describe(card.classes), f"{card.model}, {data}, {chosen} images"
    rows = found.per_class()
    paths = [
        write_csv(folder / "classes.csv", rows),
        write_csv(folder / "predictions.csv", found.predictions()),
        *save_figure(draw_confusion(found.confusion(), classes, title), folder / "confusion"),
        write_json(folder / "metrics.json", content),
    ]
    print_results(console, f"{data}, {chosen} images", {card.model: metrics})
    console.print(_worst(rows, dict(zip(card.classes, classes, strict=True))))
    console.print(
        f"{found.rate:,.1f} images/s with reading, {found.model_rate:,.1f} images/s of the model "
        f"alone",
        soft_wrap=True,
    )
    print_paths(console, paths)


def _load(
    checkpoint: Path | None, released: Path | None, model: str | None
) -> "tuple[nn.Module, Card]":
    """Loads the checkpoint that the options name."""
    from localmamba.tasks.checkpoints import load_checkpoint
    from localmamba.tasks.imagenet import load_published

    if (checkpoint is None) == (released is None):
        raise ValueError("name one checkpoint: --checkpoint FILE, or --released FILE --model NAME")
    if checkpoint is not None:
        if model is not None:
            raise ValueError("model goes with --released; a --checkpoint names its model itself")
        return load_checkpoint(checkpoint)
    assert released is not None
    if model is None:
        raise ValueError("released needs the name of its model, such as --model localvim_tiny")
    return load_published(model, released)


def _worst(rows: list[dict[str, Any]], names: dict[str, str]) -> Table:
    """Tabulates the classes with the lowest recall."""
    found = sorted((row for row in rows if row["images"]), key=lambda row: float(row["recall"]))
    title = "classes, by recall" if len(found) <= WORST else "classes with the lowest recall"
    table = Table(title=title, box=box.SIMPLE, show_edge=False)
    table.add_column("class", overflow="fold")
    for name in ("images", "recall %", "precision %"):
        table.add_column(name, justify="right")
    table.add_column("most frequent error", overflow="fold")
    for row in found[:WORST]:
        rates = ("" if row[k] is None else f"{100 * row[k]:.2f}" for k in ("recall", "precision"))
        error = (
            f"{names[row['confused_with']]} ({row['confused_images']})"
            if row["confused_images"]
            else ""
        )
        table.add_row(names[row["class"]], f"{row['images']:,}", *rates, error)
    return table
