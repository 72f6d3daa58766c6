"""Output of the commands: result tables and the files of a run.

Names of classes, files and folders are printed as they are, not as rich's markup.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from localmamba._format import format_metric, is_fraction


def make_console(stderr: bool = False) -> Console:
    """Creates a console that prints text as it is: no markup, no emoji codes, no highlighting."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def print_results(
    console: Console, title: str, results: Mapping[str, Mapping[str, float]], note: str = ""
) -> None:
    """Prints a table with a row per model and a column per metric.

    Args:
        console: Console from `make_console`.
        title: Title of the table.
        results: Metrics of each model, the same ones for all.
        note: Caption below the table.
    """
    table = Table(title=title, box=box.SIMPLE, show_edge=False, caption=note or None)
    table.add_column("model", no_wrap=True)
    for name in next(iter(results.values())):
        table.add_column(f"{name} %" if is_fraction(name) else name, justify="right")
    for model, metrics in results.items():
        table.add_row(model, *(format_metric(name, value) for name, value in metrics.items()))
    console.print(table)


def print_paths(console: Console, paths: Sequence[Path]) -> None:
    """Prints the files of a run, relative to the folder of the first."""
    folder = paths[0].parent
    console.print(f"\nin {folder}:", soft_wrap=True)
    for path in paths:
        console.print(f"  {path.relative_to(folder)}", soft_wrap=True)
