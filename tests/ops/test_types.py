"""Host code of the operators is typed; only functions that a compiler reads may not be."""

import ast
from pathlib import Path

import pytest

from localmamba import ops

ROOT = Path(ops.__file__).parent

COMPILED = {"jit", "kernel", "inline", "function", "_instruction", "overload"}
"""Decorators by Triton (`triton.jit`) and Numba: mypy cannot check what they compile."""


def decorators(function: ast.FunctionDef) -> set[str]:
    """Names of the decorators, without their arguments and modules."""
    called = (d.func if isinstance(d, ast.Call) else d for d in function.decorator_list)
    return {d.attr if isinstance(d, ast.Attribute) else ast.unparse(d) for d in called}


def host_functions(tree: ast.AST) -> list[ast.FunctionDef]:
    """Functions that no compiler but Python's reads, nested ones too."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            if decorators(node) & COMPILED:
                continue
            found.append(node)
        found += host_functions(node)
    return found


@pytest.mark.parametrize(
    "module", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_host_functions_are_annotated(module: Path) -> None:
    untyped = []
    for function in host_functions(ast.parse(module.read_text())):
        arguments = function.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        named += [x for x in (arguments.vararg, arguments.kwarg) if x is not None]
        bare = [a.arg for a in named if a.annotation is None and a.arg not in ("self", "cls")]
        if bare or (function.returns is None and function.name != "__init__"):
            untyped.append(f"{function.name}({', '.join(bare)}), line {function.lineno}")
    assert not untyped
