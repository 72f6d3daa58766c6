"""Parameters and multiply-adds of image models, timm's and ours, by two counting rules.

Both rules count convolutions, linear layers and matrix products, one operation a multiply-add, and
leave out norms, activations and sums. They differ in what they take for the S6 branches of a block:

- `all`: everything that runs, in every direction, padded steps included. A step of the scan costs
  5 operations a state (delta A, its exponential, delta u times B, the new state, its part of C h)
  and 2 a channel (delta u, D u).
- `paper`: what the paper's tables were made with. Where the convolution follows the scan (LocalVim,
  Vim), it takes convolution, x_proj and dt_proj once though they run once a direction, and the scan
  as above; elsewhere (LocalVMamba, VMamba) it takes all projections, and 9 operations a state and 1
  a channel for the scan. Padded steps are left out.
"""

from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


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

    def conv(self, steps: int) -> int:
        """Multiply-adds of the convolution, one direction."""
        return steps * self.channels * self.taps

    def scan(self, steps: int, per_state: int, per_channel: int) -> int:
        """Operations of the scan, one direction."""
        return steps * self.channels * (per_state * self.states + per_channel)


def count_all(b: Branches) -> int:
    """The rule `all`."""
    projected = (b.steps if b.taps else b.tokens) * b.projected  # grid order holds no padding
    return b.directions * (b.conv(b.steps) + projected + b.scan(b.steps, 5, 2))


def count_as_paper(b: Branches) -> int:
    """The rule `paper`."""
    projected = b.tokens * b.projected
    if b.taps:
        return b.conv(b.tokens) + projected + b.directions * b.scan(b.tokens, 5, 2)
    return b.directions * (projected + b.scan(b.tokens, 9, 1))


RULES: dict[str, Callable[[Branches], int]] = {"all": count_all, "paper": count_as_paper}


def _formula(rule: str) -> Callable[..., int]:
    """What the counter wants for `s6_branches`: from its arguments' shapes, two FLOPs a count."""

    def flops(*shapes: torch.Size, out_shape: object) -> int:  # noqa: ARG001 - the counter gives it
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
        return 2 * x[0] * RULES[rule](branches)

    return flops


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
    formulas = {torch.ops.localmamba.s6_branches: _formula(rule)}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter, torch.no_grad():
        model(image)
    return counter.get_total_flops() // 2
