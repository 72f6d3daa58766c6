"""Parameters and multiply-adds of image models, timm's and ours, by two counting rules.

Both rules count convolutions, linear layers and matrix products, one operation a multiply-add, and
leave out activations and sums. They differ in the rest:

- `all` counts everything that runs, the same for every model: all S6 branches with their padded
  steps, 5 operations a state and step for the scan (delta A, its exponential, delta u times B, the
  new state, its part of C h) and 2 a channel and step (delta u, D u). Norms are left out.
- `paper` is what the paper's tables were made with, and not the same for every model. LocalVim and
  Vim: a formula that takes convolution, x_proj and dt_proj once, though they run once a direction,
  and the scan as above; padding and norms left out. LocalVMamba and VMamba: the release's fvcore
  count, 9 operations a state and step, 1 a channel and step, padding counted, and 5 a value for
  layer norms.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import timm
import torch
from torch import Size, nn
from torch.utils.flop_counter import FlopCounterMode

from .models import LocalVMamba

Formula = Callable[..., int]
"""Shapes of an op's arguments, and `out_shape`, to its operations."""

NORM = 5
"""Operations a value of a layer norm, where norms are counted."""


@dataclass(frozen=True)
class Branches:
    """The sizes of one call of `s6_branches`, for one image.

    Attributes:
        directions: K.
        tokens: L.
        steps: P, padding included.
        channels: D.
        states: N.
        taps: W, 0 without a convolution along the scan.
        projected: Multiply-adds of x_proj and dt_proj for one token and direction.
    """

    directions: int
    tokens: int
    steps: int
    channels: int
    states: int
    taps: int
    projected: int

    def inputs(self, steps: int) -> int:
        """Multiply-adds of what makes the inputs of the scan, one direction."""
        return steps * (self.channels * self.taps + self.projected)

    def scan(self, steps: int, per_state: int, per_channel: int) -> int:
        """Operations of the scan, one direction."""
        return steps * self.channels * (per_state * self.states + per_channel)


def _all(b: Branches) -> int:
    made = b.steps if b.taps else b.tokens  # in grid order there is no padding
    return b.directions * (b.inputs(made) + b.scan(b.steps, 5, 2))


def _plain_as_paper(b: Branches) -> int:
    return b.inputs(b.tokens) + b.directions * b.scan(b.tokens, 5, 2)


def _hierarchical_as_paper(b: Branches) -> int:
    return b.directions * (b.inputs(b.steps) + b.scan(b.steps, 9, 1))


def _branches(count: Callable[[Branches], int]) -> Formula:
    def formula(*shapes: Size, out_shape: object) -> int:  # noqa: ARG001 - the counter passes it
        x, conv_weight, _, x_proj, dt_weight, _, A, _, index, _ = shapes
        branches = Branches(
            directions=index[0],
            tokens=x[1],
            steps=index[1],
            channels=x[2],
            states=A[2],
            taps=conv_weight[2] if conv_weight else 0,
            projected=x_proj[1] * x_proj[2] + dt_weight[1] * dt_weight[2],
        )
        return x[0] * count(branches)

    return formula


def _depthwise(x: Size, weight: Size, *_: object, out_shape: object) -> int:  # noqa: ARG001
    return prod(x) * weight[2] * weight[3]


def _norm_of_input(x: Size, *_: object, out_shape: object) -> int:  # noqa: ARG001
    return NORM * prod(x)


def _norm_of_merged(y: Size, *shapes: Size, out_shape: object) -> int:  # noqa: ARG001
    """Of `combine_directions`, whose fifth argument is the norm's weight."""
    return NORM * prod(y) // y[1] if shapes[3] else 0


def _attention(norm: int) -> Formula:
    """SCAttn's two linear layers, and its norms at `norm` operations a value."""

    def formula(*shapes: Size, out_shape: object) -> int:  # noqa: ARG001
        y, _, _, _, reduce_weight, _, select_weight, _, norm_weight, *_ = shapes
        linear = y[0] * y[1] * (prod(reduce_weight) + prod(select_weight))
        values = prod(y) + (prod(y) // y[1] if norm_weight else 0)
        return linear + norm * values

    return formula


def _formulas(model: nn.Module, rule: str) -> dict[object, Formula]:
    """What is counted beside convolutions and matrix products."""
    ops = torch.ops.localmamba
    if rule == "paper" and isinstance(model, LocalVMamba):
        return {
            ops.s6_branches: _branches(_hierarchical_as_paper),
            ops.depthwise_conv: _depthwise,
            ops.scattn_combine: _attention(NORM),
            ops.pool_directions: _norm_of_input,
            ops.combine_directions: _norm_of_merged,
            ops.residual_norm: _norm_of_input,
            ops.token_norm: _norm_of_input,
            torch.ops.aten.native_layer_norm: _norm_of_input,
        }
    count = _plain_as_paper if rule == "paper" else _all
    return {
        ops.s6_branches: _branches(count),
        ops.depthwise_conv: _depthwise,
        ops.scattn_combine: _attention(0),
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
    # PyTorch's own formulas count a multiply-add twice.
    return sum(count if op in extra else count // 2 for op, count in counts.items())
