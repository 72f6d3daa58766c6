"""Evolution over choices of directions, given a function that returns the loss of a choice.

Guo et al., "Single Path One-Shot Neural Architecture Search with Uniform Sampling", ECCV 2020,
section 3.4 and algorithm 1: crossover and mutation among the best, then the best of all. Here a
layer's gene is a set of `keep` directions, not a single one.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, product
from math import comb

Sets = tuple[tuple[int, ...], ...]
"""For each layer the candidates it keeps, as ascending indices."""


@dataclass(frozen=True)
class Space:
    """The space of choices: `keep` of `candidates` directions in each of `layers` layers."""

    layers: int
    candidates: int
    keep: int

    @property
    def size(self) -> int:
        return comb(self.candidates, self.keep) ** self.layers

    def every(self) -> Iterator[Sets]:
        """Iterates over all choices; only for small spaces."""
        return product(combinations(range(self.candidates), self.keep), repeat=self.layers)

    def sample(self, rng: random.Random) -> Sets:
        """Draws a choice, uniformly."""
        return tuple(self._set(rng) for _ in range(self.layers))

    def _set(self, rng: random.Random) -> tuple[int, ...]:
        return tuple(sorted(rng.sample(range(self.candidates), self.keep)))

    def mutate(self, choice: Sets, probability: float, rng: random.Random) -> Sets:
        """Swaps, with this probability in each layer, one direction for one that it lacks."""
        return tuple(
            self._swap(genes, rng) if rng.random() < probability else genes for genes in choice
        )

    def _swap(self, genes: tuple[int, ...], rng: random.Random) -> tuple[int, ...]:
        outside = [i for i in range(self.candidates) if i not in genes]
        if not outside:
            return genes
        gone = rng.choice(genes)
        return tuple(sorted([*(i for i in genes if i != gone), rng.choice(outside)]))

    @staticmethod
    def cross(one: Sets, other: Sets, rng: random.Random) -> Sets:
        """Takes each layer from one parent or the other."""
        return tuple(rng.choice(pair) for pair in zip(one, other, strict=True))


def evolve(
    loss_of: Callable[[Sets], float],
    space: Space,
    rng: random.Random,
    population: int = 50,
    generations: int = 20,
    parents: int = 10,
    mutation: float = 0.1,
    on_generation: Callable[[int, dict[Sets, float]], None] = lambda *_: None,
) -> list[Sets]:
    """Searches for choices of small loss.

    A space of at most `population * generations` choices is evaluated completely.

    Args:
        loss_of: Returns the loss of a choice; called once for each choice.
        space: Space of choices.
        rng: Random generator.
        population: Choices of a generation: half by crossover, half by mutation, of the parents.
        generations: Number of generations.
        parents: Number of best choices so far that have offspring.
        mutation: Probability that mutation changes a layer.
        on_generation: Called with the number of the generation and all losses so far.

    Returns:
        All choices evaluated, best first.
    """
    losses: dict[Sets, float] = {}
    if space.size <= population * generations:
        losses = {choice: loss_of(choice) for choice in space.every()}
        on_generation(generations, losses)
        return sorted(losses, key=losses.__getitem__)
    offspring = [space.sample(rng) for _ in range(population)]
    for generation in range(1, generations + 1):
        for choice in offspring:
            if choice not in losses:
                losses[choice] = loss_of(choice)
        on_generation(generation, losses)
        best = sorted(losses, key=losses.__getitem__)[:parents]
        crossed = [
            space.cross(rng.choice(best), rng.choice(best), rng) for _ in range(population // 2)
        ]
        mutated = [
            space.mutate(rng.choice(best), mutation, rng) for _ in range(population - len(crossed))
        ]
        offspring = crossed + mutated
    return sorted(losses, key=losses.__getitem__)
