"""`localmamba show`: figures of scan orders, of directions, and of searches."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table

from localmamba.ops import check_directions
from localmamba.search import Choice, agreement, entropy


def show(
    what: Literal["scan", "directions", "search"],
    names: list[str],
    grid: str = "14x14",
    output: Path | None = None,
) -> None:
    """Draws scan orders, the directions of every layer, or what searches came to; PNG and SVG.

    Args:
        what: What the names are: scan orders; directions of every layer, as JSON files or models;
            or folders of searches, of which the agreement is shown too if there are several.
        names: Such as w7, or localvim_tiny, or runs/x.
        grid: Rows x columns of tokens, for scan orders.
        output: The figure's path without its ending; by default in the folder of what is drawn, or
            in this one.

    Examples:
      localmamba show scan w7 --grid 14x14
      localmamba show scan h v w2 w7 hilbert snake --output scans
      localmamba show directions localvim_tiny localvmamba_tiny localvmamba_small
      localmamba show directions runs/x/directions.json
      localmamba show search runs/seed-0 runs/seed-1
    """
    draw = {"scan": _show_scans, "directions": _show_directions, "search": _show_searches}
    console = Console()
    for path in draw[what](names, grid, output, console):
        console.print(str(path), highlight=False, soft_wrap=True)


def parse_grid(text: str) -> tuple[int, int]:
    """`14x20` -> (14, 20)."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise ValueError(f"grid must be rows x columns, such as 14x14, got {text!r}")
    return int(match[1]), int(match[2])


def _show_scans(
    names: Sequence[str], grid: str, output: Path | None, console: Console
) -> list[Path]:
    from localmamba.figures.scans import draw_scans
    from localmamba.figures.style import save_figure

    del console
    figure = draw_scans(list(names), parse_grid(grid))
    return save_figure(figure, output or f"scan-{'-'.join(names[:4])}")


def _show_directions(
    names: Sequence[str], grid: str, output: Path | None, console: Console
) -> list[Path]:
    from localmamba.figures.directions import draw_directions
    from localmamba.figures.style import save_figure

    del grid, console
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
    """Directions of every layer, a title and the layers of each stage, of a file or a model.

    Raises:
        ValueError: If it is neither, or the model has no directions.
    """
    import timm

    from localmamba.complexity import abstract_model
    from localmamba.layers import DirectionalMixer

    if Path(name).is_file():
        return _load_file(Path(name))
    if not timm.is_model(name):
        raise ValueError(f"{name!r} is neither a file nor a model; see timm.list_models('local*')")
    mixers = [m for m in abstract_model(name).modules() if isinstance(m, DirectionalMixer)]
    if not mixers:
        raise ValueError(f"{name} has no scan directions")
    return [list(mixer.directions) for mixer in mixers], name, stage_depths(name)


def _load_file(path: Path) -> tuple[list[list[str]], str, tuple[int, ...]]:
    """`load_table` for a file of `localmamba search` or `train`, or a bare table."""
    import timm

    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no file of directions: {error}") from None
    entry = content if isinstance(content, dict) else {"directions": content}
    rows = entry.get("directions")
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise ValueError(f"{path} must hold a list of directions for every layer")
    model = str(entry.get("model", path.stem))
    depths = stage_depths(model) if timm.is_model(model) else ()
    fits = sum(depths) == len(rows)
    return [check_directions(row) for row in rows], model, depths if fits else ()


def stage_depths(model: str) -> tuple[int, ...]:
    """Blocks of each stage of a hierarchical model; empty for a plain one."""
    from localmamba.complexity import abstract_model
    from localmamba.layers import DirectionalMixer
    from localmamba.models import LocalVMamba

    made = abstract_model(model)
    if not isinstance(made, LocalVMamba):
        return ()
    mixers = [(name, m) for name, m in made.named_modules() if isinstance(m, DirectionalMixer)]
    return tuple(Counter(name.split(".")[1] for name, _ in mixers).values())


def _show_searches(
    names: Sequence[str], grid: str, output: Path | None, console: Console
) -> list[Path]:
    del grid
    folders = [Path(name) for name in names]
    choices = [Choice.load(folder / "directions.json") for folder in folders]
    for choice in choices:
        print_choice(console, choice)
    if len(choices) > 1:
        tables = [choice.directions for choice in choices]
        chance = len(tables[0][0]) / len(choices[0].candidates)
        console.print(
            f"agreement of {len(tables)} searches: {agreement(tables):.2f} of a layer's directions "
            f"(at random {chance:.2f})"
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
    """The two figures of a search: what it chose, and the probabilities over training.

    Args:
        folder: Of the search.
        stem: Beginning of the paths; by default the figures go into the folder.
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
    """A row for each layer: its directions and how undecided it is."""
    undecided = entropy(choice.probabilities)
    state = "" if choice.epoch == choice.epochs else f", epoch {choice.epoch} of {choice.epochs}"
    table = Table(
        title=f"{choice.model}, {choice.strategy}, seed {choice.seed}{state}",
        box=box.SIMPLE,
        show_edge=False,
        caption=f"entropy: 0 decided, 1 uniform; in the mean {sum(undecided) / len(undecided):.3f}",
    )
    table.add_column("layer", justify="right")
    table.add_column("directions")
    table.add_column("entropy", justify="right")
    for layer, (names, value) in enumerate(zip(choice.directions, undecided, strict=True), start=1):
        table.add_row(str(layer), " ".join(names), f"{value:.3f}")
    console.print(table)
