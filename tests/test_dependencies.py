"""Every declared library is used and documented, and every import is declared."""

import ast
import re
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("localmamba", "tests", "benchmarks")
TOOLS = {
    "pytest-xdist": "/pytest --numprocesses",
    "ruff": "/ruff check",
    "mypy": "/mypy",
    "hatchling": 'build-backend = "hatchling.build"',
}
"""Programs that nothing imports, and the text in Makefile or pyproject.toml that runs them."""
FIXED = {"cuda": ["cuda-bindings"], "triton": ["triton"]}
"""Distributions of modules that may not be installed, or that several distributions share."""

pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").is_file(), reason="needs a checkout of the repository"
)


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def declared() -> set[str]:
    """Distributions that pyproject.toml names."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = content["project"]
    groups = [
        content["build-system"]["requires"],
        project["dependencies"],
        *project["optional-dependencies"].values(),
    ]
    names = {re.split(r"[\[<>=;]", entry)[0] for group in groups for entry in group}
    return {normalized(name) for name in names} - {"localmamba"}


@cache
def documented() -> dict[str, str | None]:
    """Distributions in docs/dependencies.md, and the one that each comes with, if that is said."""
    text = (ROOT / "docs" / "dependencies.md").read_text()
    rows = re.findall(r"^\| ([\w, -]+?)(?: \(comes with ([\w-]+)\))? \|", text, re.MULTILINE)
    return {
        normalized(name): parent or None
        for names, parent in rows
        for name in names.split(", ")
        if name not in ("package", "---")
    }


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            modules.add(node.module.split(".")[0])
    return modules


@cache
def imported() -> set[str]:
    """Distributions that the package, its tests or its benchmarks import."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    own = {"localmamba"} | {path.stem for path in files if ROOT / "localmamba" not in path.parents}
    own |= {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()} - set(FIXED)
    modules = set().union(*map(imported_modules, files)) - own - sys.stdlib_module_names
    installed = packages_distributions()
    names = {m: FIXED.get(m) or installed.get(m, [m]) for m in modules}
    return {normalized(name) for found in names.values() for name in found}


def test_declared_libraries_are_imported() -> None:
    assert declared() - set(TOOLS) - imported() == set()


def test_declared_tools_are_run() -> None:
    text = (ROOT / "Makefile").read_text() + (ROOT / "pyproject.toml").read_text()
    assert set(TOOLS) <= declared()
    assert [tool for tool, call in TOOLS.items() if call not in text] == []


def test_imported_libraries_are_declared() -> None:
    provided = {name for name, parent in documented().items() if parent in declared()}
    assert imported() - declared() - provided == set()


def test_documentation_lists_what_is_declared_or_comes_with_it() -> None:
    assert {name for name, parent in documented().items() if parent is None} == declared()
    assert {parent for parent in documented().values() if parent} <= declared()
    assert {name for name, parent in documented().items() if parent} <= imported()
