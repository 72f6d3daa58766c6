"""Folder of a run and the readable files in it."""

import csv
import fcntl
import io
import json
import platform
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from localmamba._files import DRAFTS, remove, write_atomically

RUNS = Path("runs")

METRICS = "metrics.json"
"""Written last, when a run has ended."""

STATES = ("state.pt", "state-before.pt")
"""States of a run that has not ended: the newest and the one before."""


@contextmanager
def open_run_folder(
    output: Path | None, name: str, overwrite: bool = False, resume: bool = False
) -> Iterator[Path]:
    """Makes the folder of a run and keeps other runs out of it until the end.

    What a killed run has left half written is removed, and without `resume` the states and the
    metrics of an older run too.

    Args:
        output: As `make_run_folder` takes it.
        name: Name of the run.
        overwrite: Whether `output` may exist and hold files; those of the same name are replaced.
        resume: Whether the run goes on from a state in the folder.

    Raises:
        ValueError: If another run is under way in the folder, or from `make_run_folder`.
    """
    folder = make_run_folder(output, name, overwrite or resume)
    with (folder / ".lock").open("w") as lock:
        try:
            # The kernel unlocks when this process ends, however it does. A lock by `flock` would
            # stay with its worker processes.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is under way in {folder}") from None
        stale = [] if resume else [folder / file for file in (METRICS, *STATES)]
        for path in (*folder.glob(DRAFTS), *stale):
            remove(path)
        yield folder


def is_finished(output: Path | None) -> bool:
    """Returns whether the run in a folder has ended, so that nothing is left to resume.

    Raises:
        ValueError: If no folder is given.
    """
    if output is None:
        raise ValueError("resume needs the run's folder: --output FOLDER")
    return (output / METRICS).exists() and not any((output / name).exists() for name in STATES)


def finish(folder: Path, metrics: Mapping[str, Any]) -> Path:
    """Writes metrics.json, with versions, and removes the states."""
    path = write_json(folder / METRICS, {**metrics, "made_with": versions()})
    for name in reversed(STATES):
        remove(folder / name)
    return path


def make_run_folder(output: Path | None, name: str, overwrite: bool = False) -> Path:
    """Makes the folder of a new run.

    Args:
        output: The folder; by default runs/<name>, or runs/<name>-2 and so on if that is taken.
        name: Name of the run.
        overwrite: Whether `output` may exist and hold files; those of the same name are replaced.

    Raises:
        ValueError: If `output` is a file, or holds files and may not.
    """
    if output is None:
        return _make_numbered(RUNS / name.replace("/", "-"))
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file; name a folder")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ValueError(f"output {output} holds files already; name another or pass --overwrite")
    output.mkdir(parents=True, exist_ok=True)
    return output


def _make_numbered(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    number, chosen = 1, path
    while True:
        try:
            # mkdir decides, so that two runs that start together do not share a folder.
            chosen.mkdir()
        except FileExistsError:
            number += 1
            chosen = path.with_name(f"{path.name}-{number}")
        else:
            return chosen


def write_config(folder: Path, command: str, config: Mapping[str, Any]) -> Path:
    """Writes config.yaml, which the command takes back with --config."""
    path = folder / "config.yaml"
    again = f"localmamba {command} --config {shlex.quote(str(path))}"
    text = yaml.safe_dump(plain(config), sort_keys=False, default_flow_style=None, width=100)
    write_atomically(path, f"# again: {again}\n{text}")
    return path


def write_json(path: Path, content: Any) -> Path:
    """Writes JSON."""
    write_atomically(path, json.dumps(plain(content), indent=1) + "\n")
    return path


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Writes rows with the same keys."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())
    return path


def versions() -> dict[str, str]:
    """Returns the versions of Python and the libraries that decide a figure."""
    names = ("localmamba", "torch", "timm", "lightning", "numpy")
    return {"python": platform.python_version()} | {name: package_version(name) for name in names}


def package_version(name: str) -> str:
    """Returns the version of an installed package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # a checkout on the path
        return "not installed"


def plain(value: Any) -> Any:
    """Returns a value with tuples as lists and paths as text, as YAML and JSON have them."""
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value
