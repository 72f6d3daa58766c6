"""Each strategy finds the best choice of a problem whose choices have all been trained."""

import json

import copy_task
import pytest

from localmamba.search import STRATEGIES

USUAL = {"steps": 600, "lr": 0.01}
SETTINGS = {
    "softmax": {"steps": 500, "lr": 0.003},
    "binary_gates": {"steps": 700, "lr": 0.008, "choice_lr": 0.015, "choice_warmup": 0.5},
    "partial_channels": {
        "steps": 400, "lr": 0.01, "choice_lr": 0.012, "choice_warmup": 0.0, "partial": 2
    },
}  # fmt: skip
"""How long and how fast they train, where not as usual. So trained, softmax, single_path and
binary_gates found the best choice with all of seeds 0 to 14, partial_channels with all but seed 11
(on a CPU, one thread). The paper's `partial` of 4 leaves 8 of 32 channels to hold two bits of four
directions: 1 of seeds 0 to 4 found it, 4 of them at twice the width.
"""

RANKING = json.loads(copy_task.RANKING.read_text())
"""Every choice, best first, and its losses from three seeds: what `copy_task.main` wrote."""

BEST = [row["directions"] for row in RANKING if max(row["losses"]) < 0.05]


def as_sets(directions: copy_task.Table) -> list[set[str]]:
    return [set(row) for row in directions]


def test_every_choice_was_trained_and_the_best_stand_apart():
    found = [row["directions"] for row in RANKING]
    assert sorted(found) == sorted(copy_task.all_choices())
    assert as_sets(BEST[0]) == [set(names) for names in zip(*copy_task.PATHS, strict=True)]
    assert all(min(row["losses"]) > 0.25 for row in RANKING[len(BEST) :])


@pytest.mark.parametrize("place", [0, 1, len(RANKING) - 1])
def test_ranking_is_true(place):
    row = RANKING[place]
    loss = copy_task.train(row["directions"], seed=0)
    assert loss == pytest.approx(row["losses"][0], abs=0.05)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategy_finds_a_best_choice(strategy, seed):
    found = copy_task.search(strategy, seed, **SETTINGS.get(strategy, USUAL))
    assert as_sets(found) in [as_sets(choice) for choice in BEST]
