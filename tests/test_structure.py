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
SHARED = {"_files", "_format", "_signals"}
"""Private modules that every part may import; they import nothing of this package."""
TOOLS = {"figures", "complexity", "benchmark"}
"""Serve the command line alone; each may use all that comes before it, and the others."""

OPERATORS = {"causal_conv", "combine", "depthwise_conv", "residual_norm", "selective_scan"}
"""Folders of `ops`: each imports itself, `_common` and `scan_orders`."""
COMPOSED = {("selective_scan", "causal_conv")}
"""Operators that are made of another one: the S6 branches begin with the causal convolution."""
HEAVY = ["lightning", "numba", "triton", "transformers", "matplotlib", "sklearn", "torchmetrics"]


def part_of(module: Path) -> str:
    """`ops` for localmamba/ops/__init__.py, `benchmark` for localmamba/benchmark.py."""
    return module.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_names(module: Path) -> Iterator[tuple[str, ...]]:
    """The names in this package that a module imports, inside functions too, as their parts."""
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
                yield tuple(rest)


def allowed_parts(part: str) -> set[str]:
    if part in SHARED:
        return set()
    if part == LEAF:
        return {LEAF, *SHARED}
    if part in TOOLS:
        return {*CHAIN[:-1], LEAF, *SHARED, *TOOLS}
    lower = {*CHAIN[: CHAIN.index(part) + 1], *SHARED}
    if part in {"search", "tasks", "recipes", "cli"}:
        lower.add(LEAF)
    return lower | TOOLS if part == "cli" else lower


each_module = pytest.mark.parametrize("module", MODULES, ids=lambda m: str(m.relative_to(ROOT)))


def test_the_import_order_names_no_absent_part() -> None:
    assert {*CHAIN, LEAF, *SHARED, *TOOLS} <= set(map(part_of, MODULES))


@each_module
def test_imports_go_one_way(module: Path) -> None:
    """An import inside a function counts as one at the top."""
    part = part_of(module)
    if part == "__init__":
        return
    known = {*CHAIN, LEAF, *SHARED, *TOOLS}
    assert part in known, f"{part} has no place in the import order: give it one in this test"
    imported = {name[0] for name in imported_names(module)}
    wrong = (imported & known) - allowed_parts(part)
    assert not wrong, f"{part} must not import {', '.join(sorted(wrong))}"


@each_module
def test_operators_stand_alone(module: Path) -> None:
    """An operator imports itself and what all share, which is private to `ops`."""
    _, folder, *_ = (*module.relative_to(ROOT).parts, "", "")
    inside = {name[1] for name in imported_names(module) if name[0] == "ops" and len(name) > 1}
    if part_of(module) != "ops":
        private = {name for name in inside if name.startswith("_")}
        assert not private, f"{module.name} imports private parts of ops: {sorted(private)}"
    elif folder in OPERATORS:
        composed = {other for one, other in COMPOSED if one == folder}
        wrong = inside - {folder, "_common", "scan_orders"} - composed
        assert not wrong, f"{folder} must not import {', '.join(sorted(wrong))}"
    elif folder == "_common":
        wrong = inside - {"_common", "scan_orders"}
        assert not wrong, f"_common must not import {', '.join(sorted(wrong))}"


def test_every_operator_is_named() -> None:
    folders = {path.parent.name for path in (ROOT / "ops").glob("*/__init__.py")}
    assert folders == {*OPERATORS, "_common"}


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


@each_module
def test_no_swallowed_arguments(module: Path) -> None:
    """**kwargs only where they are passed on, and only in timm's entry points."""
    for node in ast.walk(ast.parse(module.read_text())):
        if not isinstance(node, ast.FunctionDef) or node.args.kwarg is None:
            continue
        name = node.args.kwarg.arg
        passed_on = any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(node))
        swallowed = part_of(module) not in ("models", "search") or not passed_on
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
