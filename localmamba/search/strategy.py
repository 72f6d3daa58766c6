"""The base of the strategies, their registry and settings, and one step of a search."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from .choice import check_keep, top_directions
from .supernet import find_mixers, make_supernet

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class SearchSettings:
    """Settings of a search.

    Attributes:
        keep: Directions of a layer that the final model has.
        choice_share: Share of the training images that are held out for the choice, where a
            strategy uses such images.
        choice_lr: Learning rate of alpha where it has an optimizer of its own.
        choice_warmup: Share of the training in which alpha is frozen, where it has an optimizer
            of its own.
        partial: One in so many inner channels passes the directions, where a strategy runs them
            on a part of the channels.
        population: Choices of a generation, where a strategy evolves them.
        generations: Generations of that evolution.
        val_images: Largest number of held-out images on which such a choice is evaluated.
    """

    keep: int = 4
    choice_share: float = 0.2
    choice_lr: float = 6e-3
    choice_warmup: float = 0.3
    partial: int = 4
    population: int = 50
    generations: int = 20
    val_images: int = 2048

    def __post_init__(self) -> None:
        for name in ("choice_share", "choice_lr"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if not 0 <= self.choice_warmup < 1:
            raise ValueError(
                f"choice_warmup must be at least 0 and below 1, got {self.choice_warmup}"
            )
        for name in ("keep", "partial", "population", "generations", "val_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class Strategy:
    """A way to train a supernet and to choose directions from it.

    A training loop calls, in each step:

        strategy.start_weight_pass()             # then trains the weights on training images
        strategy.record(loss)
        inputs = strategy.start_choice_pass(progress)
        if inputs:                               # loss on held-out images
            strategy.finish_choice_pass(torch.autograd.grad(loss, inputs))

    `search_step` is such a step. `end_epoch` follows each epoch, `conclude` the last one.
    Constructing a strategy makes the model the supernet that it needs, which may replace
    parameters: construct it before the optimizer, and before a saved state is loaded.

    Args:
        model: A supernet, or a model to make one of, with the same directions in every block.
        settings: Settings of the search.
        seed: Seed of everything that the strategy draws.

    Raises:
        ValueError: If the model has no mixers, their directions differ, or `keep` does not fit.
    """

    name: ClassVar[str]
    """Set by `register_strategy`."""

    uses_holdout: ClassVar[bool] = False
    """Whether some training images are held out from the weights, to choose directions by."""

    weighted: ClassVar[bool] = True
    """Whether the supernet's branches are added with weights softmax(alpha)."""

    fixed_paths: ClassVar[bool] = True
    """Whether every training batch runs the same branches."""

    reusable: ClassVar[bool] = True
    """Whether a final model can start from the weights of its supernet."""

    def __init__(self, model: nn.Module, settings: SearchSettings, seed: int):
        self.mixers = find_mixers(make_supernet(model, self.weighted))
        self.candidates = check_keep(self.mixers[0].directions, settings.keep)
        self.settings = settings
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def alphas(self) -> list[nn.Parameter]:
        """Logits of each layer, [C] each."""
        return [mixer.alpha for mixer in self.mixers if mixer.alpha is not None]

    def alpha_table(self) -> Tensor:
        """Returns the logits of all layers on the CPU, float32 [layers, C], without gradient."""
        return torch.stack([alpha.detach().float() for alpha in self.alphas]).cpu()

    def sample(
        self, branches: Sequence[Sequence[int]], weights: Sequence[Tensor] | None = None
    ) -> None:
        """Sets the branches that each layer runs until the next call.

        Args:
            branches: Positions in the candidates, [layers][K].
            weights: Weights of these branches for each layer, [K] each; see `SupernetMixer`.
        """
        for layer, (mixer, row) in enumerate(zip(self.mixers, branches, strict=True)):
            mixer.sample(row, None if weights is None else weights[layer])

    def start_weight_pass(self) -> None:
        """Sets the branches that the next training batch runs."""

    def record(self, loss: Tensor) -> None:
        """Records the loss of the weight pass."""

    def end_epoch(self) -> None:
        """Updates what `probabilities` returns; to be called after each epoch."""

    def start_choice_pass(self, progress: float) -> list[Tensor]:
        """Sets the branches that the next held-out batch runs.

        Args:
            progress: Share of the training that is done.

        Returns:
            Tensors whose gradients `finish_choice_pass` takes; empty if there is no such pass.
        """
        del progress
        return []

    def finish_choice_pass(self, gradients: Sequence[Tensor]) -> None:
        """Trains alpha with the gradients of the tensors from `start_choice_pass`."""
        raise NotImplementedError

    def probabilities(self) -> Tensor:
        """Returns the probabilities of the candidates so far, float32 [layers, C]."""
        return torch.softmax(self.alpha_table(), dim=1)

    def start_evaluation(self) -> None:
        """Sets the branches with which the supernet is evaluated: all, or those kept so far."""
        for mixer in self.mixers:
            mixer.sample(None)

    def conclude(self, held_out_loss: Callable[[], float]) -> Tensor:
        """Returns the final probabilities, after training, float32 [layers, C].

        Args:
            held_out_loss: Returns the loss on held-out images with the branches that are set.
        """
        del held_out_loss
        return self.probabilities()

    def directions(self, probabilities: Tensor) -> list[list[str]]:
        """Returns the likeliest directions of each layer."""
        return top_directions(probabilities, self.candidates, self.settings.keep)

    def kept_branches(self) -> list[list[int]]:
        """Returns the likeliest directions so far, as positions in the candidates."""
        kept = self.directions(self.probabilities())
        return [[self.candidates.index(name) for name in row] for row in kept]

    def state_dict(self) -> dict[str, Any]:
        """Returns the state that a resumed search needs besides the model's."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state from `state_dict`."""
        self.generator.set_state(state["generator"].cpu())


class AlternatingStrategy(Strategy):
    """Base of strategies whose alpha has its own optimizer and images (DARTS, section 2.2)."""

    uses_holdout = True
    betas: ClassVar[tuple[float, float]]
    weight_decay: ClassVar[float] = 0.0

    def __init__(self, model: nn.Module, settings: SearchSettings, seed: int):
        super().__init__(model, settings, seed)
        for alpha in self.alphas:
            alpha.requires_grad_(False)  # keeps it out of the weights' optimizer
        self.optimizer = torch.optim.Adam(
            self.alphas, settings.choice_lr, betas=self.betas, weight_decay=self.weight_decay
        )

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Moves alpha along its gradients, one for each layer."""
        for alpha, gradient in zip(self.alphas, gradients, strict=True):
            alpha.grad = gradient.to(alpha.dtype)
        self.optimizer.step()
        self.optimizer.zero_grad()

    # An optimizer returns its own tensors and keeps those that it is given, and its steps write
    # into them: without a copy, two strategies would share their averages.
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "optimizer": deepcopy(self.optimizer.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.optimizer.load_state_dict(deepcopy(state["optimizer"]))


STRATEGIES: dict[str, type[Strategy]] = {}
"""The registered strategies by name."""

StrategyClass = TypeVar("StrategyClass", bound=type[Strategy])


def register_strategy(name: str) -> Callable[[StrategyClass], StrategyClass]:
    """Registers a class in `STRATEGIES`, and so on the command line; ValueError if taken."""

    def register(strategy: StrategyClass) -> StrategyClass:
        if name in STRATEGIES:
            raise ValueError(f"there is a strategy {name!r} already: {STRATEGIES[name].__name__}")
        strategy.name = name
        STRATEGIES[name] = strategy
        return strategy

    return register


def find_strategy(name: str) -> type[Strategy]:
    """Returns the strategy of that name; ValueError if there is none."""
    if name not in STRATEGIES:
        raise ValueError(f"unknown strategy {name!r}; known: {', '.join(STRATEGIES)}")
    return STRATEGIES[name]


def make_strategy(name: str, model: nn.Module, settings: SearchSettings, seed: int = 0) -> Strategy:
    """Constructs the strategy of that name; ValueError if it or the model does not fit."""
    return find_strategy(name)(model, settings, seed)


def sample_sets(scores: Tensor, count: int, generator: torch.Generator) -> list[list[int]]:
    """Draws `count` different branches of each layer, one after another, by softmax of the scores.

    The largest of scores with Gumbel noise are such a sample without replacement (Kool et al.,
    "Stochastic Beams and Where to Find Them", ICML 2019). Equal scores give uniform sets.

    Args:
        scores: Log-probabilities up to a constant, on the CPU, [layers, C].
        count: Branches of a layer.
        generator: Random generator on the CPU.

    Returns:
        Positions [layers][count], in the order drawn.
    """
    noise = -torch.empty(scores.shape).exponential_(generator=generator).log()
    return (scores + noise).topk(count, dim=1).indices.tolist()


def search_step(
    strategy: Strategy,
    loss_of: Callable[[Batch], Tensor],
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    held_out: Batch | None,
    progress: float,
    clip_grad: float | None = None,
) -> Tensor:
    """Trains the weights on one batch, then alpha on another where the strategy does so.

    Args:
        strategy: Strategy of the supernet that `loss_of` calls.
        loss_of: Returns the loss of a batch.
        optimizer: Optimizer of the model's parameters that require a gradient.
        batch: Training batch, as `loss_of` takes it.
        held_out: Held-out batch; None if the strategy needs none.
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
    inputs = strategy.start_choice_pass(progress)
    if inputs and held_out is not None:
        strategy.finish_choice_pass(torch.autograd.grad(loss_of(held_out), inputs))
    return loss.detach()
