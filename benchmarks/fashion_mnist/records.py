"""The file of results: a line of JSON for each run."""

import json
from pathlib import Path


def as_line(record: dict) -> str:
    """What stands in the file for a record."""
    return json.dumps(record) + "\n"


def read_records(path: Path) -> list[dict]:
    """The records of a file, none if there is no file; a last line cut short is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
