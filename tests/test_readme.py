"""The documents keep their word: their Python runs, their links lead somewhere."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("localmamba/**/*.md")]
)
NOT_RUN = "<!-- not run"

pytestmark = pytest.mark.skipif(not DOCUMENTS, reason="needs a checkout")


def python_blocks(text: str) -> str:
    """The blocks of Python as one program, but for those under a `not run` mark."""
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


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {re.split(r"[\[<>=;]", entry)[0] for group in groups for entry in group}
    listed = re.findall(r"^\| ([\w, -]+) \|", (ROOT / "docs/dependencies.md").read_text(), re.M)
    explained = {name.strip() for row in listed for name in row.split(",")}
    assert names - {"localmamba"} <= explained
