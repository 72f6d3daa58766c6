"""Checkpoints tell what they are, and files of another kind are told apart."""

import json

import pytest
import torch
from safetensors.torch import save_file

from localmamba.data import InputSpec
from localmamba.models.loading import build_model
from localmamba.tasks.checkpoints import KEY, Card, load_checkpoint, save_checkpoint

ARGUMENTS = {
    "num_classes": 3,
    "in_chans": 1,
    "embed_dim": 8,
    "depth": 2,
    "directions": [["h", "w2"], ["v", "h_flip"]],
}
SPEC = InputSpec(8, 1, (0.5,), (0.25,), "bilinear", 0.9)
CARD = Card("localvim_demo", ARGUMENTS, ("a", "b", "ö"), SPEC, "digits", 0.3, 7, {"accuracy": 0.5})


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = build_model("localvim_demo", ARGUMENTS).eval()
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, model, CARD)
    return path, model


def test_a_checkpoint_is_the_model_again(saved):
    path, model = saved
    again, card = load_checkpoint(path)
    assert card == CARD
    assert not again.training
    images = torch.randn(2, 1, 8, 8)
    with torch.inference_mode():
        assert torch.equal(again(images), model(images))
    assert list(path.parent.iterdir()) == [path]


def test_writing_replaces(saved):
    path, model = saved
    with torch.no_grad():
        model.head.bias.fill_(3)
    save_checkpoint(path, model, CARD)
    assert torch.equal(load_checkpoint(path)[0].head.bias, torch.full((3,), 3.0))


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint .*none'; `localmamba train` writes"):
        load_checkpoint(tmp_path / "none")


def test_a_file_cut_short(saved):
    path, _ = saved
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is no safetensors file, or cut short"):
        load_checkpoint(path)


def test_a_pickle_is_not_opened(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match="is no safetensors file"):
        load_checkpoint(path)


def test_weights_of_others(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"does not say which model it is; .*load_released"):
        load_checkpoint(path)


def test_weights_that_do_not_fit(tmp_path):
    path = tmp_path / "other.safetensors"
    spec = {"size": 8, "channels": 1, "mean": [0.5], "std": [0.5]}
    card = {"model": "localvim_demo", "arguments": ARGUMENTS, "classes": [*"abc"], "input": spec}
    save_file({"x": torch.zeros(1)}, path, metadata={KEY: json.dumps(card)})
    with (
        pytest.warns(UserWarning, match="no checksum"),
        pytest.raises(ValueError, match="does not fit localvim_demo"),
    ):
        load_checkpoint(path)
