"""Evolution over sets of directions."""

import random

from localmamba.search.evolution import Space, evolve

SPACE = Space(layers=6, candidates=10, keep=3)
TARGET = ((0, 1, 2), (7, 8, 9), (1, 4, 7), (0, 5, 9), (2, 3, 4), (3, 6, 8))


def distance(choice) -> float:
    return sum(len(set(a) ^ set(b)) for a, b in zip(choice, TARGET, strict=True))


def is_choice(choice) -> bool:
    return len(choice) == SPACE.layers and all(
        len(set(genes)) == SPACE.keep
        and list(genes) == sorted(genes)
        and set(genes) <= set(range(10))
        for genes in choice
    )


def test_small_spaces_are_tried_whole():
    space = Space(layers=2, candidates=4, keep=2)
    assert space.size == 36
    ranked = evolve(lambda c: abs(hash(c)), space, random.Random(0), population=6, generations=6)
    assert len(set(ranked)) == 36
    assert ranked == sorted(ranked, key=lambda c: abs(hash(c)))


def test_finds_the_best_of_many_with_few_questions():
    asked = []

    def loss_of(choice) -> float:
        asked.append(choice)
        return distance(choice)

    ranked = evolve(loss_of, SPACE, random.Random(0), population=40, generations=40)
    assert distance(ranked[0]) <= 4  # of 36; the best of 1600 random choices is at 14
    assert len(set(asked)) == len(asked) <= 1600
    assert set(ranked) == set(asked)
    assert all(map(is_choice, asked))


def test_is_better_than_chance():
    draw = random.Random(1)
    best_of_random = min(distance(SPACE.sample(draw)) for _ in range(1600))
    ranked = evolve(distance, SPACE, random.Random(0), population=40, generations=40)
    assert distance(ranked[0]) < best_of_random / 2


def test_one_seed_gives_one_result():
    def run():
        return evolve(distance, SPACE, random.Random(3), population=10, generations=5)

    assert run() == run()


def test_mutation_swaps_one_direction_of_a_layer():
    draw = random.Random(0)
    for _ in range(50):
        child = SPACE.mutate(TARGET, 1.0, draw)
        assert is_choice(child)
        assert all(len(set(a) - set(b)) == 1 for a, b in zip(child, TARGET, strict=True))
    assert SPACE.mutate(TARGET, 0.0, draw) == TARGET
    whole = Space(layers=2, candidates=3, keep=3)
    assert whole.mutate(((0, 1, 2),) * 2, 1.0, draw) == ((0, 1, 2),) * 2


def test_crossing_takes_each_layer_from_a_parent():
    other = tuple(((0, 1, 3),) * 6)
    child = SPACE.cross(TARGET, other, random.Random(0))
    assert all(
        gene in pair for gene, pair in zip(child, zip(TARGET, other, strict=True), strict=True)
    )
    assert child not in (TARGET, other)
