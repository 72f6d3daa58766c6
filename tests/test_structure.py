"""The shape of the code: who imports whom, what an import costs, lost arguments."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import localmamba

ROOT = Path(localmamba.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

CHAIN = ["ops", "layers", "models", "search", "tasks", "recipes", "cli"]
"""Each part may import those before it."""
LEAF = "data"
"""Imports nothing of this package."""
TOOLS = {"figures", "complexity", "benchmark"}
"""Serve the command line alone; each may use all that comes before it, and the others."""

HEAVY = ["lightning", "numba", "triton", "transformers", "matplotlib", "sklearn", "torchmetrics"]


def part_of(module: Path) -> str:
    """`ops` for localmamba/ops/branches.py, `benchmark` for localmamba/benchmark.py."""
    return module.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_parts(module: Path) -> Iterator[str]:
    """The parts of this package that a module imports, wherever in the file it does so."""
    package = ["localmamba", *module.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            root, *rest = name.split(".")
            if root == "localmamba" and rest:
                yield rest[0]


def allowed_parts(part: str) -> set[str]:
    if part == LEAF:
        return {LEAF}
    if part in TOOLS:
        return {*CHAIN[:-1], LEAF, *TOOLS}
    lower = {*CHAIN[: CHAIN.index(part) + 1]}
    if part in {"search", "tasks", "recipes", "cli"}:
        lower.add(LEAF)
    return lower | TOOLS if part == "cli" else lower


def test_the_import_order_names_no_absent_part() -> None:
    assert {*CHAIN, LEAF, *TOOLS} <= set(map(part_of, MODULES))


@pytest.mark.parametrize("module", MODULES, ids=lambda m: str(m.relative_to(ROOT)))
def test_imports_go_one_way(module: Path) -> None:
    part = part_of(module)
    if part.startswith("_"):
        assert part == "__init__" or not set(imported_parts(module)), f"{part} is for all to import"
        return
    known = {*CHAIN, LEAF, *TOOLS}
    assert part in known, f"{part} has no place in the import order: give it one in this test"
    wrong = {other for other in imported_parts(module) if other in known} - allowed_parts(part)
    assert not wrong, f"{part} must not import {', '.join(sorted(wrong))}"


def test_import_is_light() -> None:
    """Heavy libraries are imported where they are used; timm's own imports do not count."""
    loaded = "import sys; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    ours, theirs = (
        set(
            subprocess.run(
                [sys.executable, "-c", f"import {name}; {loaded}"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.split()
        )
        for name in ("localmamba", "timm")
    )
    assert not (ours - theirs) & set(HEAVY)


def test_import_prints_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import localmamba"], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""


@pytest.mark.parametrize("module", MODULES, ids=lambda m: str(m.relative_to(ROOT)))
def test_no_swallowed_arguments(module: Path) -> None:
    """**kwargs only where they are passed on, and only in timm's entry points."""
    for node in ast.walk(ast.parse(module.read_text())):
        if not isinstance(node, ast.FunctionDef) or node.args.kwarg is None:
            continue
        name = node.args.kwarg.arg
        passed_on = any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(node))
        swallowed = part_of(module) not in {"models", "search"} or not passed_on
        assert not swallowed, f"{module}:{node.lineno} {node.name} swallows **{name}"


def public_objects() -> Iterator[tuple[str, object]]:
    """What the packages of the library export, and the public methods of exported classes."""
    packages = [m.name for m in pkgutil.iter_modules([str(ROOT)]) if m.ispkg and m.name != "cli"]
    for name in ["localmamba", *(f"localmamba.{package}" for package in packages)]:
        module = importlib.import_module(name)
        for export in getattr(module, "__all__", []):
            found = getattr(module, export)
            if not (inspect.isclass(found) or inspect.isroutine(found)):
                continue
            yield f"{name}.{export}", found
            if inspect.isclass(found):
                for method, function in vars(found).items():
                    if inspect.isfunction(function) and not method.startswith("_"):
                        yield f"{name}.{export}.{method}", function


INHERITED_MEANING = {"forward"}
"""Methods whose meaning their base class gives; what they take and return stands at the class."""


def test_public_names_are_documented() -> None:
    missing = [
        name
        for name, found in public_objects()
        if not inspect.getdoc(found) and name.rsplit(".", 1)[-1] not in INHERITED_MEANING
    ]
    assert not missing
