"""Results as a table for the eye and as CSV."""

import csv
from collections.abc import Sequence
from dataclasses import astuple, fields
from math import nan
from pathlib import Path

from rich import box
from rich.table import Table

from .settings import Result, Setting


def _comparable(setting: Setting) -> tuple[str, str, str, int]:
    """Settings with the same key are compared with each other."""
    return setting.mode, setting.device, setting.dtype, setting.size


def _time_per_image(result: Result) -> float:
    return result.milliseconds / result.setting.batch


def relative_times(results: Sequence[Result], baseline: str) -> list[float]:
    """The time an image takes over the time it takes the baseline; NaN where there is none."""
    base = {
        _comparable(r.setting): _time_per_image(r) for r in results if r.setting.model == baseline
    }
    return [_time_per_image(r) / base.get(_comparable(r.setting), nan) for r in results]


def results_tables(
    results: Sequence[Result], baseline: str, machine: dict[str, str]
) -> list[Table]:
    """A table for each mode; `ratio` is the time of an image over that of the baseline.

    Args:
        results: What was measured.
        baseline: The model whose time counts as 1.
        machine: From `describe_machine`, for the caption.
    """
    caption = ", ".join(f"{key} {value}" for key, value in machine.items())
    tables: dict[str, Table] = {}
    for result, relative in zip(results, relative_times(results, baseline), strict=True):
        s = result.setting
        if s.mode not in tables:
            tables[s.mode] = _empty_table(f"{s.mode}, {s.dtype}, {s.launch}", caption)
        tables[s.mode].add_row(*_row(result, relative))
    return list(tables.values())


def _empty_table(title: str, caption: str) -> Table:
    table = Table(
        title=title, caption=caption, box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False
    )
    table.add_column("model", overflow="fold")
    for name in ("batch", "size", "ms", "images/s", "ratio", "tokens/s", "MiB"):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _row(result: Result, relative: float) -> list[str]:
    s = result.setting
    if result.error:
        return [f"{s.model}: {result.error}", str(s.batch), str(s.size)]
    return [
        s.model,
        str(s.batch),
        str(s.size),
        f"{result.milliseconds:.2f}",
        f"{result.images_per_second:,.1f}",
        f"{relative:.2f}",
        f"{result.tokens_per_second:,.0f}",
        f"{result.memory_mib:,.0f}",
    ]


_FIGURES = ("milliseconds", "images_per_second", "tokens_per_second", "memory_mib")
_NOTES = ("relative_time", "baseline", "error")


def _columns() -> list[str]:
    """Of a setting; what the machine is called `device` for comes last."""
    return ["backend" if f.name == "device" else f.name for f in fields(Setting)]


def write_csv(
    results: Sequence[Result], baseline: str, machine: dict[str, str], path: Path
) -> None:
    """Writes every result and what it was measured on, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*_columns(), *_FIGURES, *_NOTES, *machine])
        for result, relative in zip(results, relative_times(results, baseline), strict=True):
            values = [getattr(result, name) for name in _FIGURES]
            rounded = [f"{value:.4g}" for value in [*values, relative]]
            writer.writerow(
                [*astuple(result.setting), *rounded, baseline, result.error, *machine.values()]
            )


def read_csv(path: Path) -> tuple[list[Result], dict[str, str]]:
    """The results and the machine that `write_csv` wrote.

    Raises:
        ValueError: If another program wrote the file.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or [])
        own = [*_columns(), *_FIGURES, *_NOTES]
        if columns[: len(own)] != own:
            raise ValueError(f"{path} is no table of `localmamba bench`: its columns are {columns}")
        rows = list(reader)
    results = []
    for row in rows:
        model, mode, device, dtype, batch, size, launch = (row[name] for name in _columns())
        setting = Setting(model, mode, device, dtype, int(batch), int(size), launch)
        measured = float(row["milliseconds"]), float(row["memory_mib"])
        results.append(Result(setting, *measured, row["error"]))
    return results, {name: rows[0][name] for name in columns[len(own) :]} if rows else {}
