"""Documents: their Python runs, their links resolve, their commands parse."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from localmamba.cli.parser import parse
from localmamba.cli.tables import PAPER, count_row

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("localmamba/**/*.md")]
)
NOT_RUN = "<!-- not run"

pytestmark = pytest.mark.skipif(not DOCUMENTS, reason="needs a checkout")


def python_blocks(text: str) -> str:
    """Joins the Python blocks into one program, except those marked `not run`."""
    pattern = rf"({NOT_RUN}[^\n]*\n)?```python\n(.*?)```"
    return "\n".join(code for mark, code in re.findall(pattern, text, re.DOTALL) if not mark)


def name(document: Path) -> str:
    return str(document.relative_to(ROOT))


WITH_PYTHON = [document for document in DOCUMENTS if python_blocks(document.read_text())]


@pytest.mark.parametrize("document", WITH_PYTHON, ids=name)
def test_python_runs(document: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", python_blocks(document.read_text())],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text())
    missing = [link for link in links if not (document.parent / link).exists()]
    assert not missing


def test_sizes_are_those_that_the_command_prints() -> None:
    row = r"^\| `(\w+)` \| ([\d,]+) \| ([\d.]+) G \| ([\d.]+) G \|"
    rows = re.findall(row, (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 4
    for model, parameters, as_paper, everything in rows:
        counts = count_row(next(row for row in PAPER if row.model == model))
        assert f"{counts.parameters:,}" == parameters
        assert f"{counts.as_paper / 1e9:.2f}" == as_paper
        assert f"{counts.all / 1e9:.2f}" == everything


def commands(text: str) -> list[list[str]]:
    """Returns the command lines of `localmamba` in a document, without comments."""
    lines = re.findall(r"^(?: {4}|`)localmamba ([^#`\n]+)", text, re.MULTILINE)
    return [shlex.split(line) for line in lines]


COMMAND_LINES = [line for document in DOCUMENTS for line in commands(document.read_text())]


@pytest.mark.parametrize("words", COMMAND_LINES, ids=" ".join)
def test_commands_take_these_arguments(words: list[str]) -> None:
    name, *arguments = words
    function = getattr(importlib.import_module(f"localmamba.cli.{name}"), name)
    parse(name, function, arguments)
