"""What each strategy does in a step, held against its formulas."""

from copy import deepcopy

import pytest
import timm
import torch

import localmamba  # noqa: F401 - registers the models
from localmamba.search import STRATEGIES, SearchSettings, make_strategy

SMALL = {"depth": 2, "embed_dim": 8, "d_state": 2, "in_chans": 1, "num_classes": 3}


def make(name: str, keep: int = 2, **settings):
    torch.manual_seed(0)
    model = timm.create_model("localvim_demo_search", **SMALL)
    chosen = SearchSettings(keep, choice_lr=0.05, choice_warmup=0.2, **settings)
    return model, make_strategy(name, model, chosen, seed=3)


def sampled(strategy) -> list:
    return [mixer.sampled for mixer in strategy.mixers]


def choice_pass(model, strategy, progress: float = 0.9) -> list:
    inputs = strategy.start_choice_pass(progress)
    if inputs:
        images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        loss = model(images).square().sum()
        strategy.finish_choice_pass(torch.autograd.grad(loss, inputs))
    return inputs


def test_unknown_strategies_and_settings_are_refused():
    model = timm.create_model("localvim_demo_search", **SMALL)
    with pytest.raises(ValueError, match=f"known: {', '.join(STRATEGIES)}"):
        make_strategy("random", model, SearchSettings())
    with pytest.raises(ValueError, match="keep must be 1 to 8"):
        make_strategy("softmax", model, SearchSettings(keep=9))
    with pytest.raises(ValueError, match="choice_share must lie"):
        SearchSettings(choice_share=1.0)


@pytest.mark.parametrize("name", STRATEGIES)
def test_probabilities_are_a_distribution_from_the_start(name):
    _, strategy = make(name)
    probabilities = strategy.probabilities()
    assert probabilities.shape == (2, 8)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(2))
    assert probabilities.min() > 0.1  # nothing is decided yet


@pytest.mark.parametrize("name", STRATEGIES)
def test_state_goes_on_where_it_was_taken(name):
    (model, one), (other_model, other) = make(name), make(name)
    one.start_weight_pass()
    choice_pass(model, one)
    weights, state = deepcopy(model.state_dict()), one.state_dict()

    def three_passes(model, strategy) -> list:
        seen = []
        for _ in range(3):
            strategy.start_weight_pass()
            seen.append(sampled(strategy))
            choice_pass(model, strategy)
            seen.append(strategy.probabilities().tolist())
        return seen

    went_on = three_passes(model, one)
    for _ in range(2):  # what was loaded is still what it was
        other_model.load_state_dict(weights)
        other.load_state_dict(state)
        assert three_passes(other_model, other) == went_on


def test_softmax_trains_alpha_with_the_weights():
    _model, strategy = make("softmax")
    assert all(alpha.requires_grad for alpha in strategy.alphas)
    assert not strategy.start_choice_pass(0.5)


@pytest.mark.parametrize("name", ["binary_gates", "partial_channels"])
def test_alpha_has_an_optimizer_of_its_own_and_rests_at_first(name):
    model, strategy = make(name)
    assert not any(alpha.requires_grad for alpha in strategy.alphas)
    before = strategy.alpha_table()
    assert not choice_pass(model, strategy, progress=0.1)
    assert torch.equal(before, strategy.alpha_table())
    assert choice_pass(model, strategy, progress=0.9)
    assert not torch.equal(before, strategy.alpha_table())
    assert not any(alpha.requires_grad for alpha in strategy.alphas)


@pytest.mark.parametrize("keep", [1, 3])
def test_binary_gates_open_all_but_one(keep):
    _model, strategy = make("binary_gates", keep)
    strategy.start_choice_pass(0.9)
    for mixer in strategy.mixers:
        branches, gates = mixer.sampled, mixer.weights
        assert len(set(branches)) == keep + 1
        assert sorted(gates.tolist()) == pytest.approx([0.0] + [1 / keep] * keep)
        assert min(gates[: keep - 1], default=1) > 0


def test_binary_gates_move_rivals_alone_and_keep_their_mass():
    model, strategy = make("binary_gates", keep=2)
    with torch.no_grad():
        for alpha in strategy.alphas:
            alpha.copy_(torch.randn(8, generator=torch.Generator().manual_seed(1)))
    before = strategy.alpha_table()
    choice_pass(model, strategy)
    after = strategy.alpha_table()
    for layer, pair in enumerate(strategy._rivals.tolist()):
        others = [i for i in range(8) if i not in pair]
        assert torch.equal(before[layer, others], after[layer, others])
        assert not torch.equal(before[layer, pair], after[layer, pair])
        torch.testing.assert_close(
            before[layer, pair].logsumexp(0), after[layer, pair].logsumexp(0)
        )


def test_binary_gates_follow_the_formula_of_the_pair():
    _, strategy = make("binary_gates", keep=2)
    strategy.start_choice_pass(0.9)
    gradients = [torch.tensor([5.0, 2.0, -1.0]), torch.tensor([1.0, 0.0, 4.0])]
    taken = []
    strategy.step = taken.extend
    strategy.finish_choice_pass(gradients)
    for layer in range(2):
        odds = strategy._odds[layer].clone().requires_grad_()
        logits = odds.log().detach().requires_grad_()
        # The loss as a linear function of the gates, each open with its probability.
        (torch.softmax(logits, 0) * gradients[layer][1:] / 2).sum().backward()
        torch.testing.assert_close(taken[layer][strategy._rivals[layer]], logits.grad)
        assert taken[layer].count_nonzero() == 2


def test_single_path_is_the_final_model_and_draws_uniformly():
    _model, strategy = make("single_path", keep=3)
    assert all(mixer.alpha is None for mixer in strategy.mixers)
    counts = torch.zeros(8)
    for _ in range(1000):
        strategy.start_weight_pass()
        for branches in sampled(strategy):
            counts[branches] += 1
    assert (counts - 750).abs().max() < 90


def test_single_path_estimates_from_losses():
    _, strategy = make("single_path", keep=2)
    for _ in range(400):
        strategy.start_weight_pass()
        bad = sum(5 in branches for branches in sampled(strategy))
        strategy.record(torch.tensor(1.0 + bad))
    strategy.end_epoch()
    assert (strategy.probabilities().argmin(1) == 5).all()


def test_single_path_concludes_with_the_choice_of_smallest_loss():
    _, strategy = make("single_path", keep=2, population=800, generations=1)
    target = [[1, 6], [0, 3]]

    def loss() -> float:
        return sum(len(set(a) ^ set(b)) for a, b in zip(sampled(strategy), target, strict=True))

    probabilities = strategy.conclude(loss)
    names = strategy.candidates
    assert strategy.directions(probabilities) == [[names[i] for i in row] for row in target]
    torch.testing.assert_close(probabilities.sum(1), torch.ones(2))
