"""What commands print at their end: figures in a table, and where the files are."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from localmamba.tasks.metrics import format_metric, is_share


def print_results(
    console: Console, title: str, results: Mapping[str, Mapping[str, float]], note: str = ""
) -> None:
    """A row for each model, a column for each metric.

    Args:
        console: Where to.
        title: Above the table.
        results: Model -> metric -> value; all with the same metrics.
        note: Below the table.
    """
    table = Table(title=title, box=box.SIMPLE, show_edge=False, caption=note or None)
    table.add_column("model", no_wrap=True)
    for name in next(iter(results.values())):
        table.add_column(f"{name} %" if is_share(name) else name, justify="right")
    for model, metrics in results.items():
        table.add_row(model, *(_number(name, value) for name, value in metrics.items()))
    console.print(table)


def _number(name: str, value: float) -> str:
    if is_share(name):
        return format_metric(name, value).removesuffix(" %")
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.1f}" if name == "seconds" else format_metric(name, value)


def print_paths(console: Console, paths: Sequence[Path]) -> None:
    """The files that a command wrote, below their folder."""
    console.print(f"\nin {paths[0].parent}:", highlight=False, soft_wrap=True)
    for path in paths:
        console.print(f"  {path.relative_to(paths[0].parent)}", highlight=False, soft_wrap=True)
