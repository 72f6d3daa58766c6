"""`localmamba search`: searches scan directions on a data set and leaves a run folder."""

import inspect
from pathlib import Path
from typing import Any, Literal

from localmamba.data import Augmentation, ImageSettings
from localmamba.ops import CANDIDATES
from localmamba.search import DEFAULT_STRATEGY, STRATEGIES, SearchSettings
from localmamba.tasks.settings import Hardware, TrainingSettings


def search(
    data: str,
    model: str,
    images: ImageSettings,
    augmentation: Augmentation,
    training: TrainingSettings,
    settings: SearchSettings,
    hardware: Hardware,
    candidates: list[str] | None = None,
    # The parser reads the choices, which the registry knows when the program runs.
    strategy: Literal[tuple(STRATEGIES)] = DEFAULT_STRATEGY,  # type: ignore[valid-type]
    model_args: dict[str, Any] | None = None,
    chunk_size: int = 0,
    checkpointing: bool = False,
    seed: int = 0,
    output: Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> None:
    """Searches the scan directions of every layer.

    Leaves a folder with directions.json (for train --directions; there from the first epoch on),
    probabilities.csv (of every layer after each epoch), supernet.safetensors (for train
    --start_from), metrics.csv, metrics.json, config.yaml and two figures.

    Settings that are not given come from the recipe that belongs to the data.

    Args:
        data: digits, fashion-mnist, or a folder of images: train/ and val/ (or test/) with a folder
            for each class in them, or just a folder for each class, which is then split.
        model: timm's name of a supernet, such as localvim_search, localvmamba_tiny_search or
            localvim_demo_search.
        images: Images and batches.
        augmentation: Augmentation of the training images.
        training: Optimiser and schedule.
        settings: Settings of the strategy.
        hardware: Device, number of devices, precision.
        candidates: Directions to choose from, such as h v w3 w2x7 hilbert_flip; the paper's
            eight if not given.
        strategy: {strategies}
        model_args: Further arguments of the model, such as '{embed_dim: 64}'.
        chunk_size: Directions of a layer that are computed at a time, and again in the backward
            pass, which saves memory with many candidates; 0 for all.
        checkpointing: Whether layers are run again in the backward pass, to save memory.
        seed: Seed of everything that is drawn; one seed, one result.
        output: Folder of the run; runs/search-MODEL-DATA by default, numbered if that is taken.
        overwrite: Whether the output folder may hold files; those of the same name are replaced.
        resume: Whether to go on from the last saved step of the run in the output folder.

    Examples:
      localmamba search --data digits --model localvim_demo_search
      localmamba search --data PHOTOS --model localvim_search --candidates h v w2 w7 w14 snake
      localmamba search --data PHOTOS --model localvmamba_tiny_search --strategy single_path
      localmamba search --data IMAGENET --model localvim_search --config imagenet
      localmamba search --data PHOTOS --model localvim_search --devices 2 --precision bf16-mixed
      localmamba search --config runs/x/config.yaml --output runs/x --resume
    """
    from localmamba.cli.reports import make_console, print_paths
    from localmamba.cli.show import draw_search, print_choice
    from localmamba.tasks.job import SearchJob
    from localmamba.tasks.run_folder import make_run_folder, write_config
    from localmamba.tasks.search import Search
    from localmamba.tasks.trainer import is_main_process

    if resume and output is None:
        raise ValueError("resume needs the run's folder: --output FOLDER")
    job = SearchJob(
        data=data,
        model=model,
        candidates=tuple(candidates or CANDIDATES),
        strategy=strategy,
        model_args=model_args or {},
        chunk_size=chunk_size,
        checkpointing=checkpointing,
        seed=seed,
        search=settings,
        images=images,
        augmentation=augmentation,
        training=training,
        hardware=hardware,
    )
    ready = Search(job)
    if not is_main_process():
        ready.run(output, resume=resume)
        return
    console = make_console()
    folder = make_run_folder(output, f"search-{model}-{Path(data).name}", overwrite or resume)
    config = write_config(folder, "search", job.config())
    searched = ready.run(folder, console, resume=resume)
    assert searched is not None  # this is the main process
    figures = draw_search(folder)
    print_choice(console, searched.choice)
    names = ("directions.json", "probabilities.csv", "metrics.csv", "metrics.json")
    supernet = folder / "supernet.safetensors"
    paths = [config, *(folder / name for name in names), *([supernet] * supernet.is_file())]
    print_paths(console, [*paths, *figures])


def _describe_strategies() -> str:
    """Returns a sentence for each strategy, the first of its docstring."""
    lines = (
        (inspect.getdoc(strategy) or "").partition("\n")[0] for strategy in STRATEGIES.values()
    )
    return " ".join(f"{name}: {line}" for name, line in zip(STRATEGIES, lines, strict=True))


search.__doc__ = (search.__doc__ or "").replace("{strategies}", _describe_strategies())
