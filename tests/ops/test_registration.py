"""The autograd rule that the ops register themselves: when it runs, and what it relies on."""

import pytest
import torch
from torch import Tensor

from localmamba.ops import combine_directions, scan_index, selective_scan


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
