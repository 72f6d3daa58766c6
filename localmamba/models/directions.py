"""Tables of scan directions, one row per block, from a list or a JSON file."""

import json
import os
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from ..ops import check_directions

DirectionTable = str | os.PathLike[str] | Sequence[str] | Sequence[Sequence[str]]


@cache
def _released() -> dict[str, list[list[str]]]:
    text = resources.files(__package__).joinpath("searched_directions.json").read_text()
    return json.loads(text)


def searched_directions(name: str) -> list[list[str]]:
    """Returns the directions that the paper's search found; `localvim_tiny` serves S too.

    Raises:
        ValueError: If the model has no released directions.
    """
    tables = _released()
    if name not in tables:
        raise ValueError(f"no released directions for {name!r}; known: {', '.join(tables)}")
    return [list(row) for row in tables[name]]


def _read(path: str | os.PathLike[str]) -> list[Any]:
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read directions from {os.fspath(path)!r}: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{os.fspath(path)!r} is not JSON: {error}") from None
    if isinstance(content, dict):
        if "directions" not in content:
            raise ValueError(f"{os.fspath(path)!r} has no entry 'directions'")
        content = content["directions"]
    if not isinstance(content, list):
        raise ValueError(f"{os.fspath(path)!r} must hold a list of directions, one row per block")
    return content


def resolve_directions(directions: DirectionTable, num_blocks: int) -> list[list[str]]:
    """Returns one list of direction names per block.

    Args:
        directions: A list of names (every block has them), a table of one such list per block, or
            the path of a JSON file that holds either, alone or under `directions`.
        num_blocks: Number of blocks of the model, all stages together.

    Raises:
        ValueError: If the file cannot be read, the table has another length, or a name is unknown.
    """
    rows: list[Any] = (
        _read(directions) if isinstance(directions, (str, os.PathLike)) else list(directions)
    )
    if rows and all(isinstance(row, str) for row in rows):
        rows = [rows] * num_blocks
    if any(isinstance(row, str) or not isinstance(row, Sequence) for row in rows):
        raise ValueError("directions must be a list of names, or a list of such lists")
    if len(rows) != num_blocks:
        raise ValueError(f"directions has {len(rows)} rows for {num_blocks} blocks")
    return [check_directions(row) for row in rows]
