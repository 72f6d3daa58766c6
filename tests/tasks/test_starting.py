"""Trainings that start from a checkpoint of other classes and another image size."""

import pytest
import torch

from localmamba.layers import resize_table
from localmamba.models.loading import build_model
from localmamba.tasks.training import Training

DEMO = {"embed_dim": 8, "depth": 1, "d_state": 2, "in_chans": 1}


@pytest.fixture(params=["ours", "released"])
def checkpoint(request, job, tmp_path):
    """A file, and the model in it: 10 x 10 pixels; of 10 classes, or 5."""
    if request.param == "ours":
        trained = Training(job(epochs=1, image_size=10)).run()
        trained.save(tmp_path)
        return tmp_path / "model.safetensors", trained.model
    torch.manual_seed(3)
    model = build_model("localvim_demo", {**DEMO, "num_classes": 5, "img_size": 10})
    state = {name: x for name, x in model.state_dict().items() if not name.endswith("_extra_state")}
    torch.save({"model": state}, tmp_path / "local.ckpt")
    return tmp_path / "local.ckpt", model


def test_everything_but_the_head_is_taken(job, checkpoint):
    path, model = checkpoint
    changes = {"start_from": str(path), "image_size": 8}
    if len(model.head.weight) == 5:
        with pytest.warns(UserWarning, match=r"head.weight and head.bias start anew: .* 5 classes"):
            ready = Training(job(**changes))
        fresh = Training(job(image_size=8)).model
        assert torch.equal(ready.model.head.weight, fresh.head.weight)
    else:
        ready = Training(job(**changes))
        assert torch.equal(ready.model.head.weight, model.head.weight)
    resized = resize_table(model.pos_embed, model.grid, *ready.model.grid)
    torch.testing.assert_close(ready.model.pos_embed, resized)
    for name, tensor in ready.model.blocks.state_dict().items():
        assert torch.equal(tensor, model.blocks.state_dict()[name]), name
    assert ready.run().card.metrics["loss"] < 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"x": torch.zeros(1)}}, "the checkpoint holds nothing of this model, but x"),
        ([1], "holds a list, not named tensors"),
        (None, "no checkpoint '.*file'; `localmamba train` writes"),
    ],
)
def test_checkpoints_that_do_not_fit(job, content, message, tmp_path):
    if content is not None:
        torch.save(content, tmp_path / "file")
    with pytest.raises(ValueError, match=message):
        Training(job(start_from=str(tmp_path / "file")))
