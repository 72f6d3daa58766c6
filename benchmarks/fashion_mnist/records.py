"""Results file: a line of JSON per run."""

import json
from pathlib import Path


def as_line(record: dict) -> str:
    """Returns the line of a record."""
    return json.dumps(record) + "\n"


def read_records(path: Path) -> list[dict]:
    """Reads the records of a file, none if it is absent; skips a truncated last line."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
