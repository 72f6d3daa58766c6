"""`localmamba demo`: search, training and comparison on handwritten digits."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

UNSEARCHED = ["h", "h_flip", "w2", "w2_flip"]
ROWS = ["h", "h_flip", "h", "h_flip"]
"""Rows only, on as many branches: the same number of parameters."""

NOTE = "One seed and {images} images: differences of a few images mean nothing."


def demo(
    seed: int = 0,
    threads: int | None = None,
    output: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Searches scan directions on handwritten digits and trains the model found, in 3 minutes.

    The digits (1797 images of 8 x 8, a fifth held out) come with scikit-learn; no download, no GPU.
    It does what these four commands do, and compares the model found with the same model without
    search (rows and windows of 2 in every layer) and with rows only:

      localmamba search --data digits --model localvim_demo_search
      localmamba train --data digits --model localvim_demo --directions .../directions.json
      localmamba train --data digits --model localvim_demo
      localmamba train --data digits --model localvim_demo --directions '[h, h_flip, h, h_flip]'

    Args:
        seed: Seed of everything that is drawn.
        threads: CPU threads; PyTorch's choice if not given.
        output: Folder of the run; runs/demo by default, numbered if that is taken.
        overwrite: Whether the output folder may hold files; those of the same name are replaced.

    Examples:
      localmamba demo
      localmamba demo --seed 1 --output runs/demo-seed-1
    """
    from localmamba.cli.reports import make_console, print_paths, print_results
    from localmamba.cli.show import print_choice
    from localmamba.tasks.run_folder import make_run_folder, versions, write_json

    start = time.perf_counter()
    console = make_console()
    folder = make_run_folder(output, "demo", overwrite)
    everywhere = {"data": "digits", "seed": seed, "device": "cpu", "threads": threads}
    choice, search_seconds = _search(folder / "search", everywhere, console)
    print_choice(console, choice)
    arms = {
        "searched": (folder, choice.directions),
        "without search": (folder / "without_search", UNSEARCHED),
        "rows only": (folder / "rows_only", ROWS),
    }
    results, histories = {}, {}
    for name, (place, directions) in arms.items():
        metrics, histories[name] = _train(place, everywhere, directions, console, name)
        results[name] = metrics
    paths = [folder / "model.safetensors", folder / "directions.json", folder / "config.yaml"]
    figures = _draw(folder, choice, histories)
    summary = {
        "models": results,
        "search_seconds": search_seconds,
        "seconds": round(time.perf_counter() - start, 1),
        "seed": seed,
        "made_with": versions(),
    }
    paths.append(write_json(folder / "metrics.json", summary))
    images = int(results["searched"]["images"])
    print_results(console, "digits, held-out images", results, NOTE.format(images=images))
    print_paths(console, [*paths, *figures])
    console.print(
        f"\n{summary['seconds']:.0f} s, of which {search_seconds:.0f} s search. "
        "Next: localmamba --help",
        highlight=False,
    )


def _search(folder: Path, everywhere: dict[str, Any], console: Console) -> tuple[Any, float]:
    """Returns the choice of directions, and how many seconds it took."""
    from localmamba.cli.show import draw_search
    from localmamba.recipes import load_recipe
    from localmamba.tasks.job import SearchJob
    from localmamba.tasks.search import Search

    start = time.perf_counter()
    job = SearchJob.from_config({**load_recipe("search", "digits"), **everywhere})
    ready = Search(job)
    folder.mkdir(exist_ok=True)
    searched = ready.run(folder, console, "search")
    assert searched is not None  # one process
    draw_search(folder)
    return searched.choice, round(time.perf_counter() - start, 1)


def _train(
    folder: Path,
    everywhere: dict[str, Any],
    directions: list[Any],
    console: Console,
    title: str,
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Trains from scratch; returns the metrics on held-out images, and a row an epoch."""
    from localmamba.recipes import load_recipe
    from localmamba.tasks.job import TrainingJob
    from localmamba.tasks.training import Training

    job = TrainingJob.from_config({**load_recipe("train", "digits"), **everywhere})
    folder.mkdir(exist_ok=True)
    job = replace(job, directions=directions)
    trained = Training(job).run(folder, console, f"train, {title}")
    assert trained is not None  # one process
    trained.save(folder)
    parameters = sum(parameter.numel() for parameter in trained.model.parameters())
    seconds = sum(row["seconds"] for row in trained.history)
    extra = {"parameters": parameters, "seconds": round(seconds, 1)}
    return {**trained.card.metrics, **extra}, trained.history


def _draw(folder: Path, choice: Any, histories: dict[str, Any]) -> list[Path]:
    """Draws the chosen directions of every layer, and the training curves."""
    from localmamba.figures.curves import draw_curves
    from localmamba.figures.directions import draw_directions
    from localmamba.figures.style import save_figure

    title = "directions found on handwritten digits"
    chosen = draw_directions(choice.directions, title, choice.candidates)
    curves = draw_curves(histories, "held-out", "handwritten digits")
    return [
        *save_figure(chosen, folder / "directions"),
        *save_figure(curves, folder / "curves"),
    ]
