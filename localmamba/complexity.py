"""Parameters and multiply-adds of image models, timm's and ours, by two counting rules.

Both rules count convolutions, linear layers and matrix products, one operation per multiply-add,
and leave out activations and sums. They differ in the rest:

- `all` counts everything that runs, by the formulas that each op registers for
  `torch.utils.flop_counter`: all S6 branches with their padded steps, and the scan as
  `scan_multiply_adds` counts it. Norms are left out.
- `paper` is the rule of the paper's tables, and not the same for every model. LocalVim and Vim: a
  formula that takes convolution, x_proj and dt_proj once, though they run once per direction, and
  the scan as above; padding and norms left out. LocalVMamba and VMamba: the release's fvcore count,
  9 operations per state and step, 1 per channel and step, padding counted, and 5 per value for
  layer norms.
"""

from collections.abc import Callable
from math import prod

import timm
import torch
from torch import Size, nn
from torch._ops import OpOverloadPacket
from torch.utils.flop_counter import FlopCounterMode

from .models import LocalVMamba
from .ops.selective_scan.branches import BranchSizes

Formula = Callable[..., int]
"""Shapes of an op's arguments, and `out_shape`, to its operations."""

NORM = 5
"""Operations per value of a layer norm, where norms are counted."""


def _by_name(op: OpOverloadPacket, count: Callable[[dict[str, Size]], int]) -> Formula:
    """A formula of the shapes by the names of the op's arguments; None where one is not given."""
    names = [argument.name for argument in op.default._schema.arguments]

    def formula(*shapes: Size, out_shape: object) -> int:  # noqa: ARG001 - the counter passes it
        return count(dict(zip(names, shapes, strict=False)))

    return formula


def _branches(count: Callable[[BranchSizes], int]) -> Formula:
    def formula(*shapes: Size, out_shape: object) -> int:  # noqa: ARG001
        return count(BranchSizes.from_shapes(*shapes))

    return formula


def _plain_as_paper(b: BranchSizes) -> int:
    return b.batch * (b.inputs(b.tokens) + b.directions * b.scan(b.tokens))


def _hierarchical_as_paper(b: BranchSizes) -> int:
    return b.batch * b.directions * (b.inputs(b.steps) + b.scan(b.steps, 9, 1))


def _norm(shapes: dict[str, Size]) -> int:
    """A norm over the op's first argument."""
    return NORM * prod(next(iter(shapes.values())))


def _norm_of_sum(shapes: dict[str, Size]) -> int:
    """The norm over a sum of K directions, y being [B, K, L, D]."""
    y = shapes["y"]
    return NORM * prod(y) // y[1] if shapes["norm_weight"] else 0


def _scattn_with_norms(shapes: dict[str, Size]) -> int:
    """SCAttn's two linear layers, its norm over y, and that over the sum."""
    y = shapes["y"]
    linear = y[0] * y[1] * (prod(shapes["reduce_weight"]) + prod(shapes["select_weight"]))
    return linear + _norm(shapes) + _norm_of_sum(shapes)


def _formulas(model: nn.Module, rule: str) -> dict[OpOverloadPacket, Formula]:
    """Returns the ops that a rule counts otherwise than the formulas registered with them."""
    ops = torch.ops.localmamba
    if rule == "all":
        return {}
    if not isinstance(model, LocalVMamba):
        return {ops.s6_branches: _branches(_plain_as_paper)}
    by_name = {
        ops.scattn_combine: _scattn_with_norms,
        ops.combine_directions: _norm_of_sum,
        ops.pool_directions: _norm,
        ops.residual_norm: _norm,
        ops.token_norm: _norm,
        torch.ops.aten.native_layer_norm: _norm,
    }
    return {
        ops.s6_branches: _branches(_hierarchical_as_paper),
        **{op: _by_name(op, count) for op, count in by_name.items()},
    }


RULES = ("all", "paper")


def abstract_model(name: str) -> nn.Module:
    """A registered model without memory for its weights, in evaluation mode.

    Args:
        name: A name in timm's registry.

    Raises:
        ValueError: If timm does not know the name.
    """
    if not timm.is_model(name):
        raise ValueError(f"unknown model {name!r}; timm.list_models() names all")
    with torch.device("meta"):
        return timm.create_model(name).eval()


def count_parameters(model: nn.Module) -> int:
    """The number of trained values."""
    return sum(p.numel() for p in model.parameters())


def count_multiply_adds(model: nn.Module, size: int | tuple[int, int], rule: str = "all") -> int:
    """Multiply-adds of one forward pass of one image.

    Args:
        model: Any image model; nothing is computed where it lies on the meta device.
        size: Pixels, one number or (height, width).
        rule: `all` or `paper`.

    Raises:
        ValueError: If there is no such rule.
    """
    if rule not in RULES:
        raise ValueError(f"unknown counting rule {rule!r}; known: {', '.join(RULES)}")
    height, width = (size, size) if isinstance(size, int) else size
    image = torch.empty((1, 3, height, width), device=next(model.parameters()).device)
    extra = _formulas(model, rule)
    with FlopCounterMode(display=False, custom_mapping=extra) as counter, torch.no_grad():
        model(image)
    counts = counter.get_flop_counts()["Global"]
    # Registered formulas count two FLOPs per multiply-add.
    return sum(count if op in extra else count // 2 for op, count in counts.items())
