"""What the tests of the ops share: tolerances, comparison with the reference, hostile inputs."""

from collections.abc import Callable

import torch
from torch import Tensor

FORWARD_TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
"""Root-mean-square error over root-mean-square of the truth, which starts from the same inputs."""

GRADIENT_TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 5e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.5e-2,
}
"""The same for every gradient."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Root-mean-square error over root-mean-square of the truth; NaN counts as infinite."""
    actual, expected = actual.detach().double(), expected.detach().double()
    if expected.numel() == 0:
        return 0.0
    error = (actual - expected).square().mean().sqrt()
    scale = expected.square().mean().sqrt()
    ratio = float(error / scale) if scale > 0 else float(error)
    return ratio if ratio == ratio else float("inf")


def results_and_gradients(
    op: Callable[..., Tensor], inputs: dict[str, Tensor | None], dy: Tensor | None = None
) -> dict[str, Tensor]:
    """The result of an op, as `out`, and the gradient of each floating input by its name."""
    leaves = {
        name: x.requires_grad_()
        if isinstance(x, Tensor) and x.is_floating_point() and x.is_leaf
        else x
        for name, x in inputs.items()
    }
    wanted = {name: x for name, x in leaves.items() if isinstance(x, Tensor) and x.requires_grad}
    out = op(**leaves)
    if dy is None:
        dy = some_gradient(out)
    dy = dy.to(out.dtype).expand(out.shape)
    gradients = torch.autograd.grad(out, list(wanted.values()), dy)
    return {"out": out.detach(), **dict(zip(wanted, gradients, strict=True))}


def some_gradient(out: Tensor) -> Tensor:
    """A gradient for a result of this shape: the same whenever the shape is the same."""
    generator = torch.Generator().manual_seed(out.numel())
    return torch.randn(out.shape, generator=generator, dtype=torch.float64)


def in_float64(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Copies of the inputs as the truth sees them: same numbers, float64."""
    return {
        name: x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }


def assert_matches_reference(
    op: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: dict[str, Tensor | None],
    dtype: torch.dtype = torch.float32,
    dy: Tensor | None = None,
) -> None:
    """Compares result and every gradient, by name, with the reference in float64."""
    actual = results_and_gradients(op, inputs, dy)
    expected = results_and_gradients(reference, in_float64(inputs), dy)
    for name, truth in expected.items():
        assert actual[name].shape == truth.shape, name
        given = inputs.get(name)
        if given is not None:
            assert actual[name].dtype == given.dtype, name
        table = FORWARD_TOLERANCE if name == "out" else GRADIENT_TOLERANCE
        error = relative_error(actual[name], truth)
        assert error <= table[dtype], f"{name}: {error:.2e} > {table[dtype]:.0e}"


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal random numbers that depend on shape and seed alone."""
    generator = torch.Generator().manual_seed(seed * 1000 + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def scan_inputs(
    index: Tensor,
    length: int,
    batch: int = 2,
    channels: int = 20,
    states: int = 4,
    grid_order: bool = True,
    optional: bool = True,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor | None]:
    """Arguments of `selective_scan`, in grid or in scan order, with or without the optional."""
    directions, steps = index.shape
    rows = (batch, directions, length if grid_order else steps)
    u = (batch, length, channels) if grid_order else (*rows, channels)
    return {
        "u": random(*u, seed=1, dtype=dtype),
        "dt": (random(*rows, channels, seed=2) - 2).to(dtype),
        "A": -torch.exp(random(directions, channels, states, seed=3)),
        "B": random(*rows, states, seed=4, dtype=dtype),
        "C": random(*rows, states, seed=5, dtype=dtype),
        "D": random(directions, channels, seed=6) if optional else None,
        "z": random(batch, length, channels, seed=7, dtype=dtype) if optional else None,
        "dt_bias": random(directions, channels, seed=8) if optional else None,
        "index": index,
        "length": length,
    }


def strided(x: Tensor) -> Tensor:
    """The same numbers as a slice of a larger tensor, each axis with a stride of its own."""
    larger = x.new_full([2 * size + 1 for size in x.shape], float("nan"))
    view = larger[tuple(slice(1, None, 2) for _ in x.shape)]
    view.copy_(x)
    return view


def transposed(x: Tensor) -> Tensor:
    """The same numbers with the axes in opposite order in memory."""
    axes = list(reversed(range(x.dim())))
    return x.permute(axes).contiguous().permute(axes)


def sliced_rows(x: Tensor) -> Tensor:
    """The same numbers as columns of wider rows, as B and C are columns of what x_proj gives."""
    before = x.new_full((*x.shape[:-1], 3), float("nan"))
    wider = torch.cat((before, x, x[..., :1]), dim=-1)
    return wider[..., 3:-1]


LAYOUTS = {"strided": strided, "transposed": transposed, "sliced rows": sliced_rows}
"""Ways in which the same numbers can stand in memory."""
