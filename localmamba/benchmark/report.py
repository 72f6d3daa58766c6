"""Reports of measurements: tables for the terminal, CSV files, the machine."""

import csv
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import astuple, fields
from math import nan
from pathlib import Path

import torch
from rich import box
from rich.table import Table

from localmamba.tasks.run_folder import package_version

from .measure import Result, Setting

KERNELS = {"cpu": "numba", "cuda": "triton"}
"""Library of the kernels on each device."""


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0].strip() if done.stdout else "unknown"


def describe_machine(device: str) -> dict[str, str]:
    """Returns the name of a device (`cpu` or `cuda`) and the versions that decide its speed."""
    versions = {name: package_version(name) for name in ("torch", KERNELS[device], "timm")}
    if device == "cuda":
        return {"device": torch.cuda.get_device_name(), "driver": _driver(), **versions}
    return {"device": _cpu_name(), "threads": str(torch.get_num_threads()), **versions}


def _comparable(setting: Setting) -> tuple[str, str, str, int]:
    """Key of the settings to compare with each other."""
    return setting.mode, setting.device, setting.dtype, setting.size


def _time_per_image(result: Result) -> float:
    return result.milliseconds / result.setting.batch


def relative_times(results: Sequence[Result], baseline: str) -> list[float]:
    """Returns the time per image over that of the baseline; NaN if it was not measured."""
    base = {
        _comparable(r.setting): _time_per_image(r) for r in results if r.setting.model == baseline
    }
    return [_time_per_image(r) / base.get(_comparable(r.setting), nan) for r in results]


def results_tables(
    results: Sequence[Result], baseline: str, machine: dict[str, str]
) -> list[Table]:
    """Builds a table per mode; `ratio` is the time per image over that of the baseline.

    Args:
        results: Measurements.
        baseline: Name of the baseline model.
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
    """Columns of a setting; `device` is the name of the machine's device in a later column."""
    return ["backend" if f.name == "device" else f.name for f in fields(Setting)]


def write_csv(
    results: Sequence[Result], baseline: str, machine: dict[str, str], path: Path
) -> None:
    """Writes a row per result, with the machine."""
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
    """Reads the results and the machine from a file of `write_csv`.

    Raises:
        ValueError: If the columns are others.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or [])
        own = [*_columns(), *_FIGURES, *_NOTES]
        if columns[: len(own)] != own:
            raise ValueError(
                f"{path} is not a table of `localmamba bench`; its columns are {columns}"
            )
        rows = list(reader)
    results = []
    for row in rows:
        model, mode, device, dtype, batch, size, launch = (row[name] for name in _columns())
        setting = Setting(model, mode, device, dtype, int(batch), int(size), launch)
        measured = float(row["milliseconds"]), float(row["memory_mib"])
        results.append(Result(setting, *measured, row["error"]))
    return results, {name: rows[0][name] for name in columns[len(own) :]} if rows else {}
