"""Supernets: made from models, sampled branches, chunks, a part of the channels."""

from collections import Counter

import pytest
import timm
import torch

import localmamba  # noqa: F401 - registers the models
from localmamba.layers import SS2D, LocalVimMixer
from localmamba.ops import CANDIDATES
from localmamba.search import (
    SupernetLocalVimMixer,
    SupernetMixer,
    SupernetSS2D,
    find_mixers,
    make_supernet,
)
from localmamba.search.strategy import sample_sets

SMALL = {"depth": 2, "embed_dim": 8, "d_state": 2, "in_chans": 1, "num_classes": 3}


def demo_supernet(**arguments):
    torch.manual_seed(0)
    return timm.create_model("localvim_demo_search", **SMALL | arguments).double()


def make_images(count: int = 2):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("name", ["localvim_demo_search", "localvmamba_demo_search"])
def test_mixers_are_found_in_order(name):
    model = timm.create_model(name)
    mixers = find_mixers(model)
    assert [mixer.directions for mixer in mixers] == [list(CANDIDATES)] * len(mixers)
    assert mixers


def test_other_models_are_no_supernets():
    with pytest.raises(ValueError, match="no mixer"):
        make_supernet(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no supernet"):
        find_mixers(timm.create_model("localvim_demo", depth=2))
    uneven = timm.create_model("localvim_demo", depth=2, directions=[["h"], ["v"]])
    with pytest.raises(ValueError, match="same candidate directions"):
        find_mixers(make_supernet(uneven))

    class Own(SS2D):
        pass

    with pytest.raises(ValueError, match="no supernet mixer for Own"):
        make_supernet(Own(16))


@pytest.mark.parametrize("name", ["localvim_demo", "localvmamba_demo"])
def test_a_model_becomes_a_supernet_in_place(name):
    """Without alpha it is the same function, with it the registered supernet of that size."""
    torch.manual_seed(0)
    model = timm.create_model(name, in_chans=1, directions=CANDIDATES)
    parameters, images = dict(model.named_parameters()), make_images().float()
    plain_names = set(model.state_dict())
    expected = model(images)
    assert make_supernet(model, weighted=False) is model
    torch.testing.assert_close(model(images), expected)
    assert all(parameters[key] is value for key, value in model.named_parameters())
    make_supernet(make_supernet(model))
    assert not torch.allclose(model(images), expected)
    names = set(timm.create_model(f"{name}_search").state_dict())
    assert set(model.state_dict()) == names
    assert all(key.endswith(".alpha") for key in names - plain_names)
    make_supernet(model, weighted=False)
    torch.testing.assert_close(model(images), expected)


def test_a_path_is_the_supernet_without_the_other_branches():
    model, images = demo_supernet(), make_images()
    mixers = find_mixers(model)
    weights = torch.tensor([0.3, 0.7]).double()
    for mixer, kept in zip(mixers, ([1, 6], [4, 0]), strict=True):
        mixer.sample(kept, weights)
    sampled = model(images)
    with torch.no_grad():
        for mixer, kept in zip(mixers, ([1, 6], [4, 0]), strict=True):
            chosen = torch.full((8,), -1e9).double()
            chosen[kept] = weights.log()
            mixer.alpha.copy_(chosen)
            mixer.sample(None)
    torch.testing.assert_close(sampled, model(images))


def test_only_sampled_branches_run():
    model, images = demo_supernet(), make_images()
    mixers = find_mixers(model)
    shapes = []
    for mixer in mixers:
        mixer.branches.register_forward_hook(lambda _m, _i, y: shapes.append(y.shape[1]))
    for mixer, kept in zip(mixers, ([2, 5, 7], [0]), strict=True):
        mixer.sample(kept)
    model(images).square().sum().backward()
    assert shapes == [3, 1]
    for mixer, kept in zip(mixers, ([2, 5, 7], [0]), strict=True):
        used = mixer.branches.dt_weight.grad.flatten(1).abs().sum(1) > 0
        assert used.nonzero().flatten().tolist() == kept


@pytest.mark.parametrize("name", ["localvim_demo_search", "localvmamba_demo_search"])
@pytest.mark.parametrize("chunk_size", [1, 3])
def test_running_in_chunks_changes_nothing(name, chunk_size):
    torch.manual_seed(0)
    model = timm.create_model(name, in_chans=1, d_state=2).double()
    images = make_images()
    expected = model(images)
    names = [n for n, _ in model.named_parameters()]
    gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    for mixer in find_mixers(model):
        mixer.chunk_size = chunk_size
    found = model(images)
    torch.testing.assert_close(found, expected)
    again = torch.autograd.grad(found.square().sum(), list(model.parameters()))
    for parameter, one, other in zip(names, gradients, again, strict=True):
        torch.testing.assert_close(one, other, msg=parameter)


@pytest.mark.parametrize("name", ["localvim_demo_search", "localvmamba_demo_search"])
def test_part_of_the_channels_passes_the_directions(name):
    model = timm.create_model(name, in_chans=1, scattn="channel+spatial")
    sizes = []
    for mixer in find_mixers(model):
        mixer.partial_channels(4)
        assert mixer.attn.local_reduce is not None
        mixer.branches.register_forward_hook(lambda _m, _i, y: sizes.append(y.shape[3]))
    model(make_images().float()).square().sum().backward()
    assert sizes == [mixer.inner_dim // 4 for mixer in find_mixers(model)]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_channels_must_divide():
    mixer = find_mixers(demo_supernet())[0]
    with pytest.raises(ValueError, match="16 channels"):
        mixer.partial_channels(3)
    make_supernet(mixer, weighted=False)
    with pytest.raises(ValueError, match="with alpha"):
        mixer.partial_channels(2)


def test_sets_are_drawn_without_repeats_and_follow_the_scores():
    generator = torch.Generator().manual_seed(0)
    uniform = torch.zeros(1, 5)
    drawn = [sample_sets(uniform, 3, generator)[0] for _ in range(3000)]
    assert all(len(set(branches)) == 3 for branches in drawn)
    counts = Counter(branch for branches in drawn for branch in branches)
    assert all(abs(counts[branch] - 1800) < 150 for branch in range(5))
    scores = torch.tensor([[0.0, 1.0, 2.0]])
    first = Counter(sample_sets(scores, 2, generator)[0][0] for _ in range(3000))
    expected = 3000 * torch.softmax(scores[0], 0)
    assert all(abs(first[branch] - expected[branch]) < 120 for branch in range(3))


FOUR = ["h", "v_flip", "w2", "w3_flip"]
MIXERS = [(LocalVimMixer, SupernetLocalVimMixer), (SS2D, SupernetSS2D)]


def make_mixer(plain_class, directions=FOUR) -> SupernetMixer:
    """A float64 mixer of a supernet with nothing left at 0 or 1."""
    torch.manual_seed(0)
    mixer = make_supernet(plain_class(16, directions=directions, d_state=4)).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer


@pytest.mark.parametrize(("plain_class", "supernet_class"), MIXERS)
def test_mixer_adds_normalized_branches(plain_class, supernet_class):
    """With weights that choose one direction, the sum is that direction's LayerNorm."""
    mixer = make_mixer(plain_class)
    assert type(mixer) is supernet_class
    x = torch.randn(1, 3, 4, 16, dtype=torch.float64)
    arguments = (x,) if plain_class is SS2D else (x.flatten(1, 2), 3, 4)
    weights = torch.softmax(mixer.alpha, 0)
    expected = mixer(*arguments)
    mixer.sample(None, weights)
    torch.testing.assert_close(mixer(*arguments), expected)
    # LayerNorm and the sum are linear in the weights before the second norm of SS2D.
    if plain_class is LocalVimMixer:
        mixed = torch.zeros_like(expected)
        for k, weight in enumerate(weights):
            mixer.sample([k], torch.ones(1))
            mixed = mixed + weight * mixer(*arguments)
        torch.testing.assert_close(mixed, expected)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("plain_class", [LocalVimMixer, SS2D])
def test_a_part_of_the_branches_is_a_smaller_supernet(plain_class, weighted):
    mixer, chosen = make_supernet(make_mixer(plain_class), weighted), [3, 1]
    part = make_supernet(make_mixer(plain_class, [FOUR[k] for k in chosen]), weighted)
    state = {name: x.detach() for name, x in mixer.named_parameters()}
    for name in state:
        if name.startswith("branches.") or name == "alpha":
            state[name] = state[name][chosen]
    part.load_state_dict(state, strict=False)  # without the record of the directions
    x = torch.randn(1, 3, 4, 16, dtype=torch.float64)
    arguments = (x,) if plain_class is SS2D else (x.flatten(1, 2), 3, 4)
    mixer.sample(chosen)
    torch.testing.assert_close(mixer(*arguments), part(*arguments))
    mixer(*arguments).sum().backward()
    gradient = mixer.branches.A_log.grad.flatten(1).norm(dim=1)
    assert (gradient[chosen] > 0).all()
    assert (gradient[[0, 2]] == 0).all()


def test_a_scripted_supernet_refuses_sampled_branches():
    model = demo_supernet().eval()
    find_mixers(model)[0].sample([1, 2])
    with pytest.raises(torch.jit.Error, match="runs all branches"):
        torch.jit.script(model)(make_images())
