"""`localmamba show`: draws scan orders, directions and searches."""

import json
import re
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table

from localmamba.cli.reports import make_console
from localmamba.ops import check_directions
from localmamba.search import Choice, agreement, entropy


def show(
    what: Literal["scan", "directions", "search"],
    names: list[str],
    grid: str = "14x14",
    output: Path | None = None,
) -> None:
    """Draws scan orders, the directions of every layer, or the results of searches; PNG and SVG.

    Args:
        what: Kind of the names: scan directions; JSON files or models, for the directions of every
            layer; or folders of searches (prints the agreement of several).
        names: Names, such as w7, localvim_tiny or runs/x.
        grid: Rows x columns of tokens, for scan orders.
        output: Path of the figure without suffix; by default beside the file or in the folder
            drawn, else in the current folder.

    Examples:
      localmamba show scan w7 --grid 14x14
      localmamba show scan h v w2 w7 hilbert snake --output scans
      localmamba show directions localvim_tiny localvmamba_tiny localvmamba_small
      localmamba show directions runs/x/directions.json
      localmamba show search runs/seed-0 runs/seed-1
    """
    console = make_console()
    if what == "scan":
        paths = _draw_scans(names, parse_grid(grid), output)
    elif what == "directions":
        paths = _draw_directions(names, output)
    else:
        paths = _draw_searches(names, output, console)
    for path in paths:
        console.print(path, soft_wrap=True)


def parse_grid(text: str) -> tuple[int, int]:
    """Parses `14x20` as (14, 20)."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise ValueError(f"grid must be rows x columns, such as 14x14, got {text!r}")
    return int(match[1]), int(match[2])


def _draw_scans(names: list[str], grid: tuple[int, int], output: Path | None) -> list[Path]:
    from localmamba.figures.scans import draw_scans
    from localmamba.figures.style import save_figure

    return save_figure(draw_scans(names, grid), output or f"scan-{'-'.join(names[:4])}")


def _draw_directions(names: list[str], output: Path | None) -> list[Path]:
    from localmamba.figures.directions import draw_directions
    from localmamba.figures.style import save_figure

    paths = []
    for name in names:
        table, title, depths = load_table(name)
        beside = Path(name).with_suffix("") if Path(name).is_file() else Path(f"directions-{name}")
        stem = output or beside
        if output is not None and len(names) > 1:
            stem = output.with_name(f"{output.name}-{Path(name).stem}")
        paths += save_figure(draw_directions(table, title, depths=depths), stem)
    return paths


def load_table(name: str) -> tuple[list[list[str]], str, tuple[int, ...]]:
    """Loads the directions of every layer, a title and the layers per stage from a file or model.

    Raises:
        ValueError: If it is neither, or the model has no directions.
    """
    import timm

    if Path(name).is_file():
        return _load_file(Path(name))
    if not timm.is_model(name):
        raise ValueError(f"{name!r} is neither a file nor a model; see timm.list_models('local*')")
    directions, depths = _model_directions(name)
    if not directions:
        raise ValueError(f"{name} has no scan directions")
    return directions, name, depths


def _load_file(path: Path) -> tuple[list[list[str]], str, tuple[int, ...]]:
    """Implements `load_table` for a file of `localmamba search` or `train`, or a bare table."""
    import timm

    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read directions from {path}: {error}") from None
    entry = content if isinstance(content, dict) else {"directions": content}
    rows = entry.get("directions")
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise ValueError(f"{path} must hold a list of directions for every layer")
    model = str(entry.get("model", path.stem))
    depths = _model_directions(model)[1] if timm.is_model(model) else ()
    fits = sum(depths) == len(rows)
    return [check_directions(row) for row in rows], model, depths if fits else ()


def _model_directions(name: str) -> tuple[list[list[str]], tuple[int, ...]]:
    """Returns the directions of every layer, and the layers per stage of a hierarchical model."""
    from localmamba.complexity import abstract_model
    from localmamba.layers import DirectionalMixer
    from localmamba.models import LocalVMamba

    model = abstract_model(name)
    stages = list(model.stages) if isinstance(model, LocalVMamba) else []
    directions, *depths = (
        [list(m.directions) for m in part.modules() if isinstance(m, DirectionalMixer)]
        for part in (model, *stages)
    )
    return directions, tuple(map(len, depths))


def _draw_searches(names: list[str], output: Path | None, console: Console) -> list[Path]:
    folders = [Path(name) for name in names]
    choices = [Choice.load(folder / "directions.json") for folder in folders]
    for choice in choices:
        print_choice(console, choice)
    if len(choices) > 1:
        tables = [choice.directions for choice in choices]
        chance = len(tables[0][0]) / len(choices[0].candidates)
        console.print(
            f"agreement of {len(tables)} searches: {agreement(tables):.2f} of a layer's directions "
            f"({chance:.2f} at random)"
        )
    stems = [output] * len(folders)
    if output is not None and len(folders) > 1:
        stems = [output.with_name(f"{output.name}-{folder.name}") for folder in folders]
    return [
        path
        for folder, stem in zip(folders, stems, strict=True)
        for path in draw_search(folder, stem)
    ]


def draw_search(folder: Path, stem: Path | None = None) -> list[Path]:
    """Draws the directions that a search chose, and the probabilities over epochs.

    Args:
        folder: Run folder of the search.
        stem: Prefix of the paths; by default the figures go into the folder.
    """
    from localmamba.figures.directions import draw_directions
    from localmamba.figures.probabilities import draw_probabilities
    from localmamba.figures.style import save_figure
    from localmamba.tasks.search import read_probabilities

    table, title, depths = load_table(str(folder / "directions.json"))
    history, candidates = read_probabilities(folder / "probabilities.csv")
    shown = candidates if len(candidates) <= 12 else None
    figures = {
        "directions": draw_directions(table, title, shown, depths),
        "probabilities": draw_probabilities(history, candidates, table, title),
    }
    paths = []
    for name, figure in figures.items():
        path = folder / name if stem is None else stem.with_name(f"{stem.name}-{name}")
        paths += save_figure(figure, path)
    return paths


def print_choice(console: Console, choice: Choice) -> None:
    """Prints the directions of each layer and the entropy of its probabilities."""
    entropies = entropy(choice.probabilities)
    state = "" if choice.epoch == choice.epochs else f", epoch {choice.epoch} of {choice.epochs}"
    table = Table(
        title=f"{choice.model}, {choice.strategy}, seed {choice.seed}{state}",
        box=box.SIMPLE,
        show_edge=False,
        caption=f"entropy: 0 decided, 1 uniform; mean {sum(entropies) / len(entropies):.3f}",
    )
    table.add_column("layer", justify="right")
    table.add_column("directions")
    table.add_column("entropy", justify="right")
    for layer, (names, value) in enumerate(zip(choice.directions, entropies, strict=True), start=1):
        table.add_row(str(layer), " ".join(names), f"{value:.3f}")
    console.print(table)
