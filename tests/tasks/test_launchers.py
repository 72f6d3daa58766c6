"""Launches of a training step's kernels come to the same; on a GPU: tests/cuda."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback

from localmamba.tasks import launch
from localmamba.tasks.job import SearchJob
from localmamba.tasks.training import Training


class Losses(Callback):
    """Notes the loss of every batch."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, module, outputs, *_):
        del trainer, module
        self.losses.append(outputs["loss"].item())


def test_a_compiled_model_has_the_same_losses(job, monkeypatch):
    # Traced only: generating code takes a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    losses = {}
    for name in ("eager", "compile"):
        noted = Losses()
        trained = Training(job(drop_path=0, ema=0.5, launch=name)).run(callbacks=(noted,))
        losses[name] = noted.losses
        assert all("_orig_mod" not in key for key in trained.model.state_dict())
    assert len(losses["eager"]) == 6
    assert losses["compile"] == pytest.approx(losses["eager"], abs=1e-5)


@pytest.mark.parametrize("device_batch", [None, 8])
def test_a_graph_leaves_gradients_where_the_loop_expects_them(job, device_batch, monkeypatch):
    """On a CPU, with the step itself in place of the replay of its graph."""
    monkeypatch.setattr(launch, "capture", lambda step: step)
    monkeypatch.setattr("localmamba.tasks.training.check_launch", lambda *_: None)
    settings = {"mixup": 0.5, "drop_path": 0.2, "ema": 0.9, "clip_grad": 0.5, "lr": 1e-2}
    settings |= {"device_batch": device_batch, "precision": "bf16-mixed"}
    eager, graph = (
        Training(job(**settings, launch=name)).run().model.state_dict()
        for name in ("eager", "graph")
    )
    for name, tensor in eager.items():
        assert torch.equal(graph[name], tensor), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"launch": "graph"}, "launch graph needs a GPU; allowed on a CPU: eager, compile"),
        (
            {"launch": "compile", "strategy": "single_path"},
            "launch compile: single_path draws its paths anew; allowed: eager",
        ),
        ({"launch": "graph", "checkpointing": True}, "launch graph: not with chunk_size and check"),
    ],
)
def test_launches_that_are_not_allowed(job, settings, message):
    config = {"data": "digits", "model": "localvim_demo_search", **settings}
    with pytest.raises(ValueError, match=message):
        Training(job(**settings)) if len(settings) == 1 else SearchJob.from_config(config)
