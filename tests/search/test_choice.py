"""The directions file, what is kept of probabilities, and how sure a search is."""

import json
import re

import pytest
import timm
import torch

import localmamba  # noqa: F401 - registers the models
from localmamba.search import Choice, agreement, check_keep, entropy, top_directions

CANDIDATES = ["h", "v", "w2", "hilbert_flip"]


def make_choice(**changes) -> Choice:
    fields = {
        "model": "localvim_demo_search",
        "strategy": "softmax",
        "candidates": CANDIDATES,
        "directions": [["h", "w2"], ["v", "hilbert_flip"]],
        "probabilities": [[0.4, 0.1, 0.3, 0.2], [0.1, 0.3, 0.2, 0.4]],
        "epoch": 2,
        "epochs": 3,
        "seed": 7,
        "settings": {"lr": 0.001},
    }
    return Choice(**fields | changes)


def test_likeliest_are_kept_in_the_order_of_the_candidates():
    probabilities = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
    assert top_directions(probabilities, CANDIDATES, 2) == [["w2", "hilbert_flip"], ["h", "v"]]
    assert top_directions(probabilities, CANDIDATES, 4) == [CANDIDATES] * 2


def test_between_equals_the_earlier_candidate_is_kept():
    assert top_directions([[0.25] * 4], CANDIDATES, 3) == [["h", "v", "w2"]]


def test_file_comes_back_as_it_was(tmp_path):
    path = tmp_path / "new" / "directions.json"
    choice = make_choice(probabilities=[[0.1 + 0.2, 1 / 3, 0.0, 1e-9]] * 2)
    choice.save(path)
    assert Choice.load(path) == choice
    assert list(tmp_path.rglob("*")) == [path.parent, path]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"directions": [["h"]]}', "\0"])
def test_other_files_are_refused_in_one_line(tmp_path, content):
    path = tmp_path / "directions.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="is not a directions file") as error:
        Choice.load(path)
    assert not re.search(r"\n|__init__", str(error.value))


def test_file_with_an_unknown_direction_is_refused(tmp_path):
    path = tmp_path / "directions.json"
    make_choice().save(path)
    path.write_text(path.read_text().replace("hilbert_flip", "sideways"))
    with pytest.raises(ValueError, match="unknown direction 'sideways'"):
        Choice.load(path)


def test_models_take_the_file(tmp_path):
    path = tmp_path / "directions.json"
    make_choice().save(path)
    model = timm.create_model("localvim_demo", depth=2, directions=str(path))
    assert [block.mixer.directions for block in model.blocks] == make_choice().directions
    with pytest.raises(ValueError, match="2 rows for 20 blocks"):
        timm.create_model("localvim_tiny", directions=path)


def test_file_says_how_the_choice_came_about(tmp_path):
    path = tmp_path / "directions.json"
    make_choice().save(path)
    assert set(json.loads(path.read_text())) == {
        "model", "strategy", "candidates", "directions", "probabilities", "epoch", "epochs", "seed",
        "settings",
    }  # fmt: skip


def test_entropy_goes_from_decided_to_uniform():
    assert entropy([[1.0, 0.0, 0.0, 0.0], [0.25] * 4]) == pytest.approx([0.0, 1.0])
    assert entropy([[1.0]]) == [0.0]


def test_agreement_is_the_share_of_common_directions():
    one, other = [["h", "v"], ["w2", "w7"]], [["h", "w2"], ["w2", "w7"]]
    assert agreement([one, one]) == 1.0
    assert agreement([one, other]) == 0.75
    assert agreement([one, other, one]) == pytest.approx((0.75 + 1.0 + 0.75) / 3)
    with pytest.raises(ValueError, match="two or more"):
        agreement([one])
    with pytest.raises(ValueError, match="same number of layers"):
        agreement([one, one[:1]])


@pytest.mark.parametrize(
    ("candidates", "keep", "message"),
    [
        (["h", "v"], 3, "keep must be 1 to 2"),
        (["h", "v"], 0, "keep must be 1 to 2"),
        (["h", "h"], 1, "candidates must differ"),
        (["h", "w0"], 1, "at least 1"),
        ([], 1, "at least one"),
    ],
)
def test_candidates_that_make_no_sense_are_refused(candidates, keep, message):
    with pytest.raises(ValueError, match=message):
        check_keep(candidates, keep)
