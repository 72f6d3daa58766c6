"""A final model that starts from its supernet."""

import pytest
import timm
import torch

import localmamba  # noqa: F401 - registers the models
from localmamba.search import SearchSettings, find_mixers, make_strategy, start_from_supernet

SMALL = {"depth": 2, "embed_dim": 8, "d_state": 2, "in_chans": 1, "num_classes": 3}


def make_supernet():
    torch.manual_seed(0)
    return timm.create_model("localvim_demo_search", **SMALL)


def test_path_of_single_path_becomes_the_same_function():
    supernet = make_supernet()
    strategy = make_strategy("single_path", supernet, SearchSettings(keep=2), seed=0)
    names = strategy.candidates
    torch.manual_seed(1)
    table = [["h", "w2_flip"], ["v_flip", "w7"]]
    model = timm.create_model("localvim_demo", directions=table, **SMALL)
    images = torch.randn(2, 1, 8, 8)
    strategy.sample([[names.index(name) for name in row] for row in table])
    expected = supernet(images)
    assert not torch.allclose(model(images), expected)
    assert start_from_supernet(model, supernet) == []
    torch.testing.assert_close(model(images), expected)


def test_branches_are_copied_by_name():
    supernet = make_supernet()
    model = timm.create_model("localvim_demo", directions=["w7", "h"], **SMALL)
    start_from_supernet(model, supernet)
    for block, theirs in zip(model.blocks, find_mixers(supernet), strict=True):
        ours = block.mixer
        for key, value in ours.branches.state_dict().items():
            rows = theirs.branches.state_dict()[key]
            assert torch.equal(value, rows[[6, 0]])


def test_another_head_keeps_its_own_values():
    model = timm.create_model("localvim_demo", directions=["h"], **SMALL | {"num_classes": 5})
    head = model.head.weight.clone()
    assert start_from_supernet(model, make_supernet()) == ["head.weight", "head.bias"]
    assert torch.equal(model.head.weight, head)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 16}, "one width and depth"),
        ({"depth": 3}, "3 blocks, a supernet of 2"),
        ({"directions": ["h", "hilbert"]}, "no hilbert among its candidates"),
    ],
)
def test_models_that_do_not_fit_are_refused(changes, message):
    model = timm.create_model("localvim_demo", **{"directions": ["h"], **SMALL, **changes})
    with pytest.raises(ValueError, match=message):
        start_from_supernet(model, make_supernet())
