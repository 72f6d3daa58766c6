"""One step of a search, for loops that do not run under Lightning."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from .strategy import Strategy

Batch = TypeVar("Batch")


def search_step(
    strategy: Strategy,
    loss_of: Callable[[Batch], Tensor],
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    held_out: Batch | None,
    progress: float,
    clip_grad: float | None = None,
) -> Tensor:
    """Trains the weights on one batch, then alpha on another where the strategy has it so.

    Args:
        strategy: Of the supernet that `loss_of` calls.
        loss_of: The loss of a batch.
        optimizer: Of the model's parameters that require a gradient.
        batch: Training images and what goes with them.
        held_out: The same from held-out images; None if the strategy needs none.
        progress: Share of the training that is done.
        clip_grad: Largest norm of the weights' gradient.

    Returns:
        The loss of the training batch, without gradient.
    """
    strategy.start_weight_pass()
    loss = loss_of(batch)
    optimizer.zero_grad()
    loss.backward()
    if clip_grad is not None:
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(weights, clip_grad)
    optimizer.step()
    strategy.record(loss)
    choice_step(strategy, loss_of, held_out, progress)
    return loss.detach()


def choice_step(
    strategy: Strategy,
    loss_of: Callable[[Batch], Tensor],
    held_out: Batch | None,
    progress: float,
) -> None:
    """The second half of `search_step`: trains alpha on a held-out batch."""
    inputs = strategy.start_choice_pass(progress)
    if inputs and held_out is not None:
        strategy.finish_choice_pass(torch.autograd.grad(loss_of(held_out), inputs))
