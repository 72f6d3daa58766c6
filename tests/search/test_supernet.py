"""What a supernet runs: sampled branches alone, in groups, on part of the channels."""

from collections import Counter

import pytest
import timm
import torch

import localmamba  # noqa: F401 - registers the models
from localmamba.ops import CANDIDATES
from localmamba.search.supernet import Paths, find_mixers, sample_sets

SMALL = {"depth": 2, "embed_dim": 8, "d_state": 2, "in_chans": 1, "num_classes": 3}


def make_supernet(**arguments):
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
        find_mixers(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="same candidate directions"):
        find_mixers(timm.create_model("localvim_demo", depth=2, directions=[["h"], ["v"]]))


def test_a_path_is_the_supernet_without_the_other_branches():
    model, images = make_supernet(), make_images()
    paths = Paths(find_mixers(model))
    weights = [torch.tensor([0.3, 0.7]).double()] * 2
    paths.set([[1, 6], [4, 0]], weights)
    sampled = model(images)
    with torch.no_grad():
        for mixer, kept in zip(find_mixers(model), ([1, 6], [4, 0]), strict=True):
            chosen = torch.full((8,), -1e9).double()
            chosen[kept] = weights[0].log()
            mixer.alpha.copy_(chosen)
    paths.clear()
    torch.testing.assert_close(sampled, model(images))


def test_only_sampled_branches_run():
    model, images = make_supernet(), make_images()
    mixers = find_mixers(model)
    shapes = []
    for mixer in mixers:
        mixer.branches.register_forward_hook(lambda _m, _i, y: shapes.append(y.shape[1]))
    Paths(mixers).set([[2, 5, 7], [0]])
    model(images).square().sum().backward()
    assert shapes == [3, 1]
    for mixer, kept in zip(mixers, ([2, 5, 7], [0]), strict=True):
        used = mixer.branches.dt_weight.grad.flatten(1).abs().sum(1) > 0
        assert used.nonzero().flatten().tolist() == kept


@pytest.mark.parametrize("name", ["localvim_demo_search", "localvmamba_demo_search"])
@pytest.mark.parametrize("at_once", [1, 3])
def test_running_in_groups_changes_nothing(name, at_once):
    torch.manual_seed(0)
    model = timm.create_model(name, in_chans=1, d_state=2).double()
    images = make_images()
    expected = model(images)
    names = [n for n, _ in model.named_parameters()]
    gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    for mixer in find_mixers(model):
        mixer.at_once = at_once
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
        mixer.narrow(4)
        assert mixer.attn.local_reduce is not None
        mixer.branches.register_forward_hook(lambda _m, _i, y: sizes.append(y.shape[3]))
    model(make_images().float()).square().sum().backward()
    assert sizes == [mixer.inner_dim // 4 for mixer in find_mixers(model)]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_channels_must_divide():
    mixer = find_mixers(make_supernet())[0]
    with pytest.raises(ValueError, match="16 channels"):
        mixer.narrow(3)
    with pytest.raises(ValueError, match="supernet"):
        find_mixers(timm.create_model("localvim_demo", depth=1))[0].narrow(2)


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
