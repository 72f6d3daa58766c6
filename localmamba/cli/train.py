"""`localmamba train`: trains a classifier on a data set and leaves a run folder."""

from pathlib import Path
from typing import Any

from localmamba.data import Augmentation, ImageSettings
from localmamba.tasks.settings import Hardware, TrainingSettings


def train(
    data: str,
    model: str,
    images: ImageSettings,
    augmentation: Augmentation,
    training: TrainingSettings,
    hardware: Hardware,
    directions: list[list[str]] | list[str] | str | None = None,
    model_args: dict[str, Any] | None = None,
    pretrained: bool = False,
    start_from: str | None = None,
    seed: int = 0,
    output: Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> None:
    """Trains a classifier and evaluates it on held-out images.

    Leaves a folder with config.yaml (every setting, to be used again with --config),
    directions.json, model.safetensors (for evaluate and predict), metrics.csv (a row an epoch),
    metrics.json (of the last weights on the held-out images) and the training curves.

    Settings that are not given come from the recipe that belongs to the data.

    Args:
        data: digits, fashion-mnist, or a folder of images: train/ and val/ (or test/) with a folder
            for each class in them, or just a folder for each class, which is then split.
        model: timm's name, of a model here or of timm's own, such as localvim_tiny or
            deit_tiny_patch16_224.
        images: Images and batches.
        augmentation: Augmentation of the training images.
        training: Optimiser and schedule.
        hardware: Device, number of devices, precision.
        directions: Scan directions of a Local model: a JSON file, as `localmamba search` writes it.
        model_args: Further arguments of the model, such as '{embed_dim: 96}'.
        pretrained: Whether to start from weights that timm fetches.
        start_from: Checkpoint to start from, of the same model or of its supernet.
        seed: Seed of initial weights, order of the images and augmentation.
        output: Folder of the run; runs/train-MODEL-DATA by default, numbered if that is taken.
        overwrite: Whether the output folder may hold files; those of the same name are replaced.
        resume: Whether to go on from the last saved step of the run in the output folder.

    Examples:
      localmamba train --data digits --model localvim_demo
      localmamba train --data PHOTOS --model localvim_tiny --directions runs/x/directions.json
      localmamba train --data PHOTOS --model localvmamba_tiny --epochs 50 --precision bf16-mixed
      localmamba train --data IMAGENET --model localvim_tiny --config imagenet-localvim --devices 8
      localmamba train --config runs/train-localvim_demo-digits/config.yaml
      localmamba train --config runs/x/config.yaml --output runs/x --resume
    """
    from localmamba.cli.reports import make_console, print_paths, print_results
    from localmamba.figures.curves import draw_curves
    from localmamba.figures.style import save_figure
    from localmamba.tasks.job import TrainingJob
    from localmamba.tasks.run_folder import make_run_folder, write_config
    from localmamba.tasks.trainer import is_main_process
    from localmamba.tasks.training import Training

    if resume and output is None:
        raise ValueError("resume needs the run's folder: --output FOLDER")
    job = TrainingJob(
        data=data,
        model=model,
        directions=directions,
        model_args=model_args or {},
        pretrained=pretrained,
        start_from=start_from,
        seed=seed,
        images=images,
        augmentation=augmentation,
        training=training,
        hardware=hardware,
    )
    ready = Training(job)
    if not is_main_process():
        ready.run(output, resume=resume)
        return
    console = make_console()
    folder = make_run_folder(output, f"train-{model}-{Path(data).name}", overwrite or resume)
    config = write_config(folder, "train", job.config())
    trained = ready.run(folder, console, resume=resume)
    assert trained is not None  # this is the main process
    saved = trained.save(folder)
    figures = save_figure(draw_curves({model: trained.history}, trained.split), folder / "curves")
    print_results(console, f"{data}, {trained.split} images", {model: trained.card.metrics})
    print_paths(console, [config, folder / "metrics.csv", *saved, *figures])
