"""What every way of searching shares: the interface that training loops see."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from .choice import check_keep, top_directions
from .supernet import Paths, find_mixers


@dataclass(frozen=True)
class SearchSettings:
    """What can be set about a search.

    Attributes:
        keep: Directions of a layer that the final model has.
        choice_share: Share of the training images that only the choice learns from, where a
            strategy keeps some apart.
        choice_lr: Learning rate of alpha where it has an optimiser of its own.
        choice_warmup: Share of the training in which only the weights learn, where a strategy
            begins so.
        partial: One in so many inner channels passes the directions, for `partial_channels`.
        population: Choices of a generation, for `single_path`.
        generations: For `single_path`.
        judge_images: At most so many held-out images judge a choice, for `single_path`.
    """

    keep: int = 4
    choice_share: float = 0.2
    choice_lr: float = 6e-3
    choice_warmup: float = 0.3
    partial: int = 4
    population: int = 50
    generations: int = 20
    judge_images: int = 2048

    def __post_init__(self) -> None:
        for name in ("choice_share", "choice_lr"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if not 0 <= self.choice_warmup < 1:
            raise ValueError(
                f"choice_warmup must be at least 0 and below 1, got {self.choice_warmup}"
            )
        for name in ("keep", "partial", "population", "generations", "judge_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class Strategy:
    """One way to train a supernet and to choose directions from it.

    A training loop calls, in each step:

        strategy.start_weight_pass()             then trains the weights on training images, as ever
        inputs = strategy.start_choice_pass(progress)
        if inputs:                               on held-out images:
            strategy.finish_choice_pass(torch.autograd.grad(loss, inputs))

    with `record` after each loss, `end_epoch` after each epoch and `conclude` at the end. It may
    change the model's mixers when it is made, so make it before an optimiser, and before a saved
    state is loaded.

    Args:
        model: A supernet; all of its mixers have the same candidate directions.
        settings: See `SearchSettings`.
        seed: Of everything that the strategy draws.

    Raises:
        ValueError: If the model is no supernet or `keep` does not fit its candidates.
    """

    name: ClassVar[str]
    uses_holdout: ClassVar[bool] = False
    """Whether it keeps some training images from the weights, to judge directions by."""

    reusable: ClassVar[bool] = True
    """Whether a final model can start from the weights of its supernet."""

    def __init__(self, model: nn.Module, settings: SearchSettings, seed: int):
        self.mixers = find_mixers(model)
        self.candidates = check_keep(self.mixers[0].directions, settings.keep)
        self.settings = settings
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)
        self.paths = Paths(self.mixers)

    @property
    def alphas(self) -> list[nn.Parameter]:
        """The logits of each layer, [C] each."""
        return [mixer.alpha for mixer in self.mixers if mixer.alpha is not None]

    def alpha_table(self) -> Tensor:
        """The logits of all layers on the CPU, float32 [layers, C], without gradient."""
        return torch.stack([alpha.detach().float() for alpha in self.alphas]).cpu()

    def start_weight_pass(self) -> None:
        """Sets the branches that the next training batch runs."""

    def record(self, loss: Tensor) -> None:
        """Takes note of the loss of the weight pass."""

    def end_epoch(self) -> None:
        """Called after each epoch, before the choice as it stands is looked at."""

    def start_choice_pass(self, progress: float) -> list[Tensor]:
        """Sets the branches that the next held-out batch runs.

        Args:
            progress: Share of the training that is done.

        Returns:
            What `finish_choice_pass` needs the loss's gradients of; empty if there is no such pass.
        """
        del progress
        return []

    def finish_choice_pass(self, gradients: Sequence[Tensor]) -> None:
        """Trains alpha with the gradients of what `start_choice_pass` returned."""
        raise NotImplementedError

    def probabilities(self) -> Tensor:
        """How much each layer wants each candidate, as known so far: float32 [layers, C]."""
        return torch.softmax(self.alpha_table(), dim=1)

    def start_evaluation(self) -> None:
        """Sets the branches with which the supernet as it stands is judged."""
        self.paths.clear()

    def conclude(self, held_out_loss: Callable[[], float]) -> Tensor:
        """The final probabilities, after training.

        Args:
            held_out_loss: The loss on held-out images with the branches that are set.
        """
        del held_out_loss
        return self.probabilities()

    def directions(self, probabilities: Tensor) -> list[list[str]]:
        """What each layer keeps."""
        return top_directions(probabilities, self.candidates, self.settings.keep)

    def kept_branches(self) -> list[list[int]]:
        """What each layer would keep now, as positions in the candidates."""
        kept = self.directions(self.probabilities())
        return [[self.candidates.index(name) for name in row] for row in kept]

    def state_dict(self) -> dict:
        """What a resumed search needs besides the model."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        """Goes on where `state_dict` was taken."""
        self.generator.set_state(state["generator"].cpu())


class AlternatingStrategy(Strategy):
    """Base of strategies whose alpha has its own optimiser and images (DARTS, section 2.2)."""

    uses_holdout = True
    betas: ClassVar[tuple[float, float]]
    weight_decay: ClassVar[float] = 0.0

    def __init__(self, model: nn.Module, settings: SearchSettings, seed: int):
        super().__init__(model, settings, seed)
        for alpha in self.alphas:
            alpha.requires_grad_(False)  # not the weights' optimiser's
        self.optimizer = torch.optim.Adam(
            self.alphas, settings.choice_lr, betas=self.betas, weight_decay=self.weight_decay
        )

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Moves alpha along its gradients, one for each layer."""
        for alpha, gradient in zip(self.alphas, gradients, strict=True):
            alpha.grad = gradient.to(alpha.dtype)
        self.optimizer.step()
        self.optimizer.zero_grad()

    # An optimiser hands out its own tensors and keeps those that it is given, and its steps write
    # into them: without a copy, two strategies would share their averages.
    def state_dict(self) -> dict:
        return {**super().state_dict(), "optimizer": deepcopy(self.optimizer.state_dict())}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.optimizer.load_state_dict(deepcopy(state["optimizer"]))
