"""Every public op in every mode of PyTorch: each cell is a right number."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ops.helpers import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, relative_error
from ops.op_calls import Call, op_calls
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

VALUE = FORWARD_TOLERANCE[torch.float32]
FIRST = GRADIENT_TOLERANCE[torch.float32]
SECOND = 4 * FIRST
"""Tolerances of results, first and second derivatives."""

Row = Callable[[Call], None]
ROWS: dict[str, Row] = {}
SLOW_ROWS: dict[str, Row] = {}
"""Rows of several seconds: for each op without its variants."""


def row(function: Row) -> Row:
    """Makes a function a row of the matrix."""
    ROWS[function.__name__] = function
    return function


def slow_row(function: Row) -> Row:
    """Makes a function a row of the matrix that variants of an op leave out."""
    SLOW_ROWS[function.__name__] = function
    return function


def close(found: Any, truth: Any, tolerance: float) -> None:
    """Compares tensors, or tuples of them, with the truth in float64."""
    found, truth = ((x,) if isinstance(x, Tensor) else tuple(x) for x in (found, truth))
    errors = [relative_error(x, y) for x, y in zip(found, truth, strict=True)]
    assert max(errors) <= tolerance, [f"{error:.1e}" for error in errors]


def leaves(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.clone().requires_grad_() for x in tensors)


def gradients(call: Call, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients of the loss by `torch.autograd`."""
    inputs = leaves(tensors)
    return torch.autograd.grad(call.loss(*inputs), inputs)


def tangents(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.flip(-1) + 0.5 for x in tensors)


@row
def result_and_gradients(call: Call) -> None:
    close(call(*call.tensors), call(*call.exact), VALUE)
    close(gradients(call, call.tensors), gradients(call, call.exact), FIRST)


@row
def forward_mode(call: Call) -> None:
    found = jvp(call, call.tensors, tangents(call.tensors))
    close(found, jvp(call, call.exact, tangents(call.exact)), FIRST)
    close(found[1], pushed_forward(call), FIRST)


def pushed_forward(call: Call) -> Tensor:
    """The derivative along `tangents` by differences in float64."""
    step = 1e-6
    ahead, behind = (
        call(*(x + sign * step * t for x, t in zip(call.exact, tangents(call.exact), strict=True)))
        for sign in (1, -1)
    )
    return (ahead - behind) / (2 * step)


@row
def dual_numbers_with_frozen_weights(call: Call) -> None:
    """Without a gradient anywhere, where a rule for gradients alone would drop the tangents."""

    def tangent(tensors: tuple[Tensor, ...]) -> Tensor:
        first, *others = tensors
        with torch.no_grad(), forward_ad.dual_level():
            dual = forward_ad.make_dual(first, first.flip(-1))
            return forward_ad.unpack_dual(call(dual, *others)).tangent

    close(tangent(call.tensors), tangent(call.exact), FIRST)


@row
def double_backward(call: Call) -> None:
    def second(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        inputs = leaves(tensors)
        first = torch.autograd.grad(call.loss(*inputs), inputs, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), inputs)

    close(second(call.tensors), second(call.exact), SECOND)


@row
def func_grad(call: Call) -> None:
    every = tuple(range(len(call.tensors)))
    close(grad(call.loss, every)(*call.tensors), gradients(call, call.exact), FIRST)


def sum_of_squared_gradients(call: Call, others: tuple[Tensor, ...]) -> Callable[[Tensor], Tensor]:
    return lambda x: grad(call.loss)(x, *others).square().sum()


@row
def grad_of_grad(call: Call) -> None:
    def second(x: Tensor, *others: Tensor) -> Tensor:
        return grad(sum_of_squared_gradients(call, others))(x)

    def truth(x: Tensor, *others: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(call.loss(x, *others), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    close(second(*call.tensors), truth(*call.exact), SECOND)


@row
def forward_over_reverse(call: Call) -> None:
    def product(x: Tensor, *others: Tensor) -> Tensor:
        return jvp(lambda x: grad(call.loss)(x, *others), (x,), (x.flip(-1),))[1]

    def truth(x: Tensor, *others: Tensor) -> Tensor:
        return torch.autograd.functional.hvp(lambda x: call.loss(x, *others), x, x.flip(-1))[1]

    close(product(*call.tensors), truth(*call.exact), SECOND)


@row
def mapped(call: Call) -> None:
    first, *others = call.tensors
    several = torch.stack((first, 0.5 * first, first - 1))
    truth = torch.stack([call(x.double(), *call.exact[1:]) for x in several])
    close(vmap(lambda x: call(x, *others))(several), truth, VALUE)
    last = vmap(lambda x: call(x, *others), in_dims=-1, out_dims=-1)(several.movedim(0, -1))
    close(last, truth.movedim(0, -1), VALUE)


@row
def per_sample_gradients(call: Call) -> None:
    first, *others = call.tensors
    several = torch.stack((first, 0.5 * first, first - 1))
    wanted = tuple(range(len(call.tensors)))
    in_dims = (0, *[None] * len(others))
    found = vmap(grad(call.loss, wanted), in_dims)(several, *others)
    each = [gradients(call, (x.double(), *call.exact[1:])) for x in several]
    close(found, [torch.stack(samples) for samples in zip(*each, strict=True)], FIRST)


@row
def jacobian(call: Call) -> None:
    first, *others = call.tensors
    found = jacrev(lambda x: call(x, *others))(first)
    truth = torch.autograd.functional.jacobian(lambda x: call(x, *call.exact[1:]), call.exact[0])
    close(found, truth, FIRST)


@row
def gradients_by_differences(call: Call) -> None:
    assert torch.autograd.gradcheck(call, leaves(call.exact), check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves(call.exact), fast_mode=True)


@row
def flops(call: Call) -> None:
    with FlopCounterMode(display=False) as counter:
        call(*call.tensors)
    assert counter.get_total_flops() == call.flops


@row
def autocast(call: Call) -> None:
    device = call.tensors[0].device.type
    for dtype in (torch.bfloat16, torch.float16):
        inputs = leaves(call.tensors)
        with torch.autocast(device, dtype):
            result = call(*inputs)
        found = torch.autograd.grad(result.float().square().sum(), inputs)
        assert result.dtype == (dtype if call.autocast else torch.float32)
        close(result, call(*call.exact), 4 * FORWARD_TOLERANCE[dtype])
        close(found, gradients(call, call.exact), 8 * GRADIENT_TOLERANCE[dtype])
        assert [x.dtype for x in found] == [torch.float32] * len(found)


@row
def other_default_dtypes(call: Call) -> None:
    """The same numbers, bit by bit: `Trainer(precision="bf16-true")` changes the default dtype."""
    expected = call(*call.tensors), *gradients(call, call.tensors)
    for default in (torch.float64, torch.float16, torch.bfloat16):
        torch.set_default_dtype(default)
        try:
            found = call(*call.tensors), *gradients(call, call.tensors)
        finally:
            torch.set_default_dtype(torch.float32)
        for x, y in zip(found, expected, strict=True):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)


@row
def inference_mode(call: Call) -> None:
    with torch.no_grad():
        expected = call(*call.tensors)
    assert not expected.requires_grad
    with torch.inference_mode():
        result = call(*call.tensors)
        device = call.tensors[0].device.type
        (inside,) = (other for other in op_calls(device) if other.name == call.name)
        again = inside(*inside.tensors)
    assert result.is_inference()
    assert torch.equal(result, expected)
    assert torch.equal(again, expected)


class Module(nn.Module):
    """An op whose inputs after the first are parameters."""

    def __init__(self, call: Call):
        super().__init__()
        self.call = call
        self.weights = nn.ParameterList(x.clone() for x in call.tensors[1:])

    def forward(self, x: Tensor) -> Tensor:
        return self.call.op(x, *self.weights)


@row
def called_with_other_parameters(call: Call) -> None:
    module = Module(call)
    doubled = {name: 2 * x.detach() for name, x in module.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(module, parameters, (call.tensors[0],)).square().sum()

    found = grad(loss)(doubled)
    truth = gradients(call, (call.exact[0], *(2 * x for x in call.exact[1:])))
    close(found.values() if found else call.tensors, truth[1:] if found else call.exact, FIRST)


@slow_row
def compiled(call: Call) -> None:
    """Without a graph break, forward and backward."""
    inputs = leaves(call.tensors)
    result = torch.compile(call.op, fullgraph=True, backend="aot_eager")(*inputs)
    close(result, call(*call.exact), VALUE)
    found = torch.autograd.grad(result.square().sum(), inputs)
    close(found, gradients(call, call.exact), FIRST)


@slow_row
def exported(call: Call) -> None:
    program = torch.export.export(Module(call), (call.tensors[0],)).module()
    assert torch.equal(program(call.tensors[0]), call(*call.tensors))


class Recorder(TorchDispatchMode):
    """Records the ops of this library that are called below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        del types
        if func.namespace == "localmamba":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@slow_row
def operator_contract(call: Call) -> None:
    with Recorder() as recorder:
        call(*call.tensors)
    (op, args), *_ = recorder.calls
    shapes = {x.shape for x in call.tensors}
    leaf = [isinstance(x, Tensor) and x.is_floating_point() and x.shape in shapes for x in args]
    wanted = [x.detach().requires_grad_() if y else x for x, y in zip(args, leaf, strict=True)]
    torch.library.opcheck(op, tuple(wanted))


def cells(rows: dict[str, Row], variants: bool) -> Iterator[Any]:
    for call in op_calls("meta"):
        for name in rows if variants or "," not in call.name else ():
            yield pytest.param(name, call.name, id=f"{name}-{call.name}")


def run_cell(name: str, column: str, device: str) -> None:
    """Runs a cell of the matrix on a device."""
    torch.manual_seed(0)
    (call,) = (call for call in op_calls(device) if call.name == column)
    (ROWS | SLOW_ROWS)[name](call)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
each_device = pytest.mark.parametrize("device", DEVICES)


@each_device
@pytest.mark.parametrize(("name", "column"), list(cells(ROWS, variants=True)))
def test_mode(name: str, column: str, device: str) -> None:
    run_cell(name, column, device)


@each_device
@pytest.mark.parametrize(("name", "column"), list(cells(SLOW_ROWS, variants=False)))
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_program(name: str, column: str, device: str) -> None:
    run_cell(name, column, device)


@pytest.mark.parametrize("column", [call.name for call in op_calls("meta")])
def test_meta_device(column: str) -> None:
    """Shapes and dtypes without memory, forward and backward."""
    real, meta = (
        next(call for call in op_calls(device) if call.name == column) for device in ("cpu", "meta")
    )
    expected, result = real(*real.tensors), meta(*leaves(meta.tensors))
    assert (result.device.type, result.dtype) == ("meta", expected.dtype)
    assert (result.shape, result.stride()) == (expected.shape, expected.stride())
    for x, gradient in zip(meta.tensors, gradients(meta, meta.tensors), strict=True):
        assert (gradient.shape, gradient.dtype, gradient.device) == (x.shape, x.dtype, x.device)


def test_the_matrix_has_every_op() -> None:
    names = {
        name.removeprefix("localmamba::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("localmamba::") and not name.endswith("_backward")
    }
    assert names - {"scan_index"} == {
        call.name for call in op_calls("meta") if "," not in call.name
    }
