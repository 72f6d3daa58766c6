"""The autograd rule that the ops register themselves: when it runs, and what it relies on."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest
import torch
from ops.op_calls import op_calls
from torch import Tensor
from torch.autograd import forward_ad

from localmamba import ops
from localmamba.ops import combine_directions, scan_index, selective_scan
from localmamba.ops._common import registration


def scan_inputs() -> dict[str, Tensor]:
    """Of `selective_scan`, with every gradient wanted."""
    shapes = {"u": (2, 6, 4), "dt": (2, 2, 6, 4), "A": (2, 4, 3), "B": (2, 2, 6, 3)}
    shapes |= {"C": shapes["B"], "D": (2, 4), "z": shapes["u"], "dt_bias": (2, 4)}
    torch.manual_seed(0)
    inputs = {name: torch.randn(shape) for name, shape in shapes.items()}
    inputs["A"] = -inputs["A"].abs()
    return {name: x.requires_grad_() for name, x in inputs.items()}


def scan(**inputs: Tensor) -> Tensor:
    index = scan_index(inputs["u"], ["h", "v_flip"], 2, 3)
    return selective_scan(**inputs, index=index)


def test_no_graph_where_none_is_asked_for() -> None:
    inputs = scan_inputs()
    assert scan(**inputs).grad_fn.name() == "selective_scanBackward"
    with torch.no_grad():
        assert scan(**inputs).grad_fn is None
    with torch.inference_mode():
        assert scan(**inputs).is_inference()
    assert scan(**{name: x.detach() for name, x in inputs.items()}).grad_fn is None


@pytest.mark.parametrize("name", list(scan_inputs()))
def test_one_gradient_alone(name: str) -> None:
    inputs = scan_inputs()
    every = dict(
        zip(inputs, torch.autograd.grad(scan(**inputs).sum(), inputs.values()), strict=True)
    )
    for other, x in inputs.items():
        x.requires_grad_(other == name)
    (alone,) = torch.autograd.grad(scan(**inputs).sum(), inputs[name])
    assert torch.equal(alone, every[name])


def test_backward_twice_only_where_the_graph_is_kept() -> None:
    y = torch.randn(2, 2, 3, 4, requires_grad=True)
    total = combine_directions(y).square().sum()
    total.backward(retain_graph=True)
    once = y.grad.clone()
    total.backward()
    assert torch.equal(y.grad, 2 * once)
    with pytest.raises(RuntimeError, match="a second time"):
        total.backward()


def test_saved_tensors_are_unpacked_once() -> None:
    unpacked: list[int] = []

    def unpack(x: Tensor) -> Tensor:
        unpacked.append(id(x))
        return x

    inputs = scan_inputs()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
        scan(**inputs).backward(torch.ones(2, 2, 6, 4))
    assert len(unpacked) == len(set(unpacked)) == len(inputs) + 2, "index and states"


HOST_FUNCTIONS = ("forward", "scan_forward", "pool_forward", "combine_forward")
FOLDERS = {
    "selective_scan": "selective_scan",
    "s6_branches": "selective_scan",
    "causal_conv": "causal_conv",
    "depthwise_conv": "depthwise_conv",
    "pool_directions": "combine",
    "combine_directions": "combine",
    "scattn_combine": "combine",
    "residual_norm": "residual_norm",
    "token_norm": "residual_norm",
}


def count_frames(
    folder: str, public: CodeType, frames: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Makes host functions of the CPU append the frames between them and a public function."""
    module = importlib.import_module(f"localmamba.ops.{folder}.cpu")
    for name in HOST_FUNCTIONS:
        if not hasattr(module, name):
            continue

        original = getattr(module, name)

        def counting(*args: Any, original: Callable = original) -> Any:
            frame, count = sys._getframe(1), 0
            while frame.f_code is not public:
                frame, count = frame.f_back, count + 1
            frames.append(count)
            return original(*args)

        monkeypatch.setattr(module, name, counting)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", FOLDERS)
def test_frames_between_a_public_op_and_its_host_function(
    name: str, gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most four in eager mode: a step of a small model is launches, and each frame costs one."""
    (call,) = (call for call in op_calls() if call.name == name)
    frames: list[int] = []
    count_frames(FOLDERS[name], getattr(ops, name).__code__, frames, monkeypatch)
    y = call(*(x.requires_grad_(gradients) for x in call.tensors))
    assert y.requires_grad == gradients
    assert frames
    assert max(frames) <= 4


PRIVATE = re.compile(r"\b(torch|forward_ad)((?:\.\w+)*\._[a-zA-Z]\w*(?:\.\w+)*)")
"""A dotted name in PyTorch of which a part is private."""


def is_there(root: str, path: str) -> bool:
    found: Any = {"torch": torch, "forward_ad": forward_ad}[root]
    for part in path.split(".")[1:]:
        found = getattr(found, part, None)
    return found is not None


def test_private_names_of_pytorch_are_there() -> None:
    """Fails with the names that a release changed; the ops then take the public path."""
    files = Path(ops.__file__).parent.rglob("*.py")
    names = {match for file in files for match in PRIVATE.findall(file.read_text())}
    assert {("torch", "._C._after_autograd_keyset"), ("forward_ad", "._current_level")} <= names
    missing = {root + path for root, path in names if not is_there(root, path)}
    assert not {name for name in missing if torch.cuda.is_available() or "cuda" not in name.lower()}
    assert hasattr(torch._C, "_are_functorch_transforms_active")
    assert registration.PRIVATE_DISPATCH


def test_nothing_private_of_numba_and_triton_is_imported() -> None:
    for file in Path(ops.__file__).parent.rglob("*.py"):
        assert not re.search(r"\b(numba\.core|triton\.runtime)\b", file.read_text()), file.name


TRY = next(
    statement
    for statement in ast.parse(Path(registration.__file__).read_text()).body
    if isinstance(statement, ast.Try)
)
"""The statement that looks for the private names."""


@pytest.mark.parametrize("name", sorted(set(PRIVATE.findall(ast.unparse(TRY)))), ids="".join)
def test_the_public_path_is_taken_by_itself(
    name: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, path = name
    *owners, last = path.split(".")[1:]
    owner = reduce(getattr, owners, {"torch": torch, "forward_ad": forward_ad}[root])
    monkeypatch.delattr(owner if isinstance(owner, ModuleType) else type(owner), last)
    namespace = dict(vars(registration))
    exec(compile(ast.Module([TRY], []), registration.__file__, "exec"), namespace)
    assert not namespace["PRIVATE_DISPATCH"]


PUBLIC_PATH = """
import sys
import timm, torch

sys.path.insert(0, {tests!r})
keep = torch._C._any_requires_grad
del torch._C._any_requires_grad  # as a release of PyTorch may
from localmamba.ops._common import registration
torch._C._any_requires_grad = keep
assert not registration.PRIVATE_DISPATCH

from ops import test_modes

failed = []
for call in test_modes.op_calls():
    for name, row in test_modes.ROWS.items():
        try:
            row(call)
        except Exception as error:
            failed.append(f"{{name}}, {{call.name}}: {{type(error).__name__}} {{error}}"[:300])
print(*failed)
"""


def test_the_public_path_serves_every_mode() -> None:
    """What runs with a PyTorch that lacks a private function: the same numbers, more slowly."""
    script = PUBLIC_PATH.format(tests=str(Path(__file__).parents[1]))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.strip(), done.stdout
