"""A small model of every family in every mode of PyTorch: right numbers."""

from collections.abc import Callable

import pytest
import torch
from model_cases import demo
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from localmamba import complexity

SMALL = {
    "localvim_demo": ((4, 6), {"img_size": (4, 6), "embed_dim": 8, "depth": 2}),
    "vim_tiny": ((32, 48), {"img_size": (32, 48), "embed_dim": 8, "depth": 2}),
    "localvmamba_demo": ((16, 24), {"embed_dims": (8, 16, 16), "depths": (1, 1, 1)}),
    "vmamba_tiny": ((16, 24), {"embed_dims": (8, 16), "depths": (1, 1)}),
}
"""Images and sizes of a small model of each family."""

each_model = pytest.mark.parametrize("name", SMALL)


def model_and_image(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """A model in evaluation mode, and two images."""
    size, arguments = SMALL[name]
    model = demo(name, **arguments)
    return model.to(dtype), torch.randn(2, 3, *size).to(dtype)


def relative_error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach() for name, x in model.named_parameters()}


def loss_of(model: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda parameters, x: functional_call(model, parameters, (x,)).square().sum()


def in_float64(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() for name, x in parameters.items()}


@each_model
def test_forward_mode(name: str) -> None:
    """The derivative along an image is a difference; frozen weights do not drop it."""
    model, x = model_and_image(name)
    tangent = torch.randn_like(x)
    _, found = jvp(model, (x,), (tangent,))
    with torch.no_grad(), forward_ad.dual_level():
        dual = model.requires_grad_(False)(forward_ad.make_dual(x, tangent))
        frozen = forward_ad.unpack_dual(dual).tangent
    model, x = model_and_image(name, torch.float64)
    step = 1e-6 * tangent.double()
    truth = (model(x + step) - model(x - step)) / 2e-6
    assert relative_error(found, truth) < 1e-4
    assert relative_error(frozen, truth) < 1e-4


@each_model
def test_double_backward(name: str) -> None:
    """A penalty on the gradient of the image, as of WGAN-GP, has gradients of every parameter."""

    def penalty_gradients(dtype: torch.dtype) -> dict[str, Tensor]:
        model, x = model_and_image(name, dtype)
        x.requires_grad_()
        (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        first.square().sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    found, truth = penalty_gradients(torch.float32), penalty_gradients(torch.float64)
    assert found.keys() == truth.keys()
    assert any(x.any() for x in found.values())
    scale = max(float(x.norm()) for x in truth.values())
    for key, x in truth.items():
        assert float((found[key].double() - x).norm()) < 1e-3 * scale, key


@each_model
def test_functional_gradients(name: str) -> None:
    """Those of `torch.func.grad` are autograd's."""
    model, x = model_and_image(name)
    found = grad(loss_of(model))(weights(model), x)
    model(x).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert relative_error(found[key], parameter.grad.double()) < 1e-4, key


@each_model
def test_per_sample_gradients(name: str) -> None:
    model, x = model_and_image(name)
    loss, parameters = loss_of(model), weights(model)
    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x[:, None])
    for i in range(len(x)):
        truth = grad(loss)(parameters, x[i : i + 1])
        for key, gradient in truth.items():
            assert relative_error(found[key][i], gradient.double()) < 1e-4, key


@each_model
@torch.no_grad()
def test_flop_counter_agrees_with_complexity(name: str) -> None:
    """`FlopCounterMode` over the model is twice the multiply-adds of the rule `all`."""
    model, x = model_and_image(name)
    with FlopCounterMode(display=False) as counter:
        model(x[:1])
    counted = complexity.count_multiply_adds(model, SMALL[name][0], rule="all")
    assert counter.get_total_flops() == 2 * counted
