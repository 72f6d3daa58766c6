"""`localmamba evaluate`: metrics of a checkpoint on held-out images."""

from pathlib import Path
from typing import Literal


def evaluate(
    checkpoint: Path,
    data: str,
    split: Literal["train", "val", "test", "all"] | None = None,
    batch_size: int = 128,
    workers: int | None = None,
    bad_images: Literal["error", "skip", "unchecked"] = "error",
    data_root: str = "~/.cache/localmamba",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    precision: Literal["32", "bf16-mixed", "16-mixed"] = "32",
    output: Path | None = None,
) -> None:
    """Evaluates a checkpoint of `localmamba train`, which names its model itself.

    Args:
        checkpoint: A model.safetensors.
        data: digits, fashion-mnist or a folder of images, as for train. Its classes must be among
            the model's.
        split: Part of the data. By default the held-out part (test, else val); of a folder that is
            not split and that the model was not trained on, all of it.
        batch_size: Images in a batch.
        workers: Processes that read image files; one a core, at most 8, if not given.
        bad_images: Stop at images that cannot be read, leave them out, or do not look for them.
        data_root: Folder of Fashion-MNIST.
        device: auto takes a GPU if there is one.
        precision: 32 bits, or autocast to a half type.
        output: Also writes the metrics to this JSON file.

    Examples:
      localmamba evaluate --checkpoint runs/x/model.safetensors --data digits
      localmamba evaluate --checkpoint model.safetensors --data NEW_PHOTOS --output metrics.json
    """
    from localmamba.cli.reports import make_console, print_results
    from localmamba.data import ImageSettings
    from localmamba.data.module import ImageData
    from localmamba.tasks.checkpoints import load_checkpoint
    from localmamba.tasks.evaluation import evaluate_model, load_evaluated
    from localmamba.tasks.run_folder import write_json
    from localmamba.tasks.settings import Hardware

    model, card = load_checkpoint(checkpoint)
    settings = ImageSettings(
        batch_size=batch_size,
        workers=workers,
        bad_images=bad_images,
        data_root=data_root,
        held_out=card.held_out,
        split_seed=card.split_seed,
    )
    source, chosen = load_evaluated(card, data, settings, split)
    console = make_console()
    images = ImageData(source, card.input, settings, evaluated=chosen)
    metrics = evaluate_model(model, images, Hardware(device, precision=precision), console)
    print_results(console, f"{data}, {chosen} images", {card.model: metrics})
    if output is not None:
        content = {"checkpoint": str(checkpoint), "data": data, "split": chosen, **metrics}
        console.print(f"written to {write_json(output, content)}", soft_wrap=True)
