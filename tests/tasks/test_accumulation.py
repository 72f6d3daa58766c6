"""A step is the same however its images are shared out among passes."""

import dataclasses

import pytest
import torch

from localmamba.data import ImageSettings
from localmamba.search import STRATEGIES
from localmamba.tasks.job import SearchJob
from localmamba.tasks.search import Search
from localmamba.tasks.training import Training


def test_passes_add_up_to_the_whole_batch(job):
    settings = {
        "drop_path": 0,
        "clip_grad": 0.5,
        "ema": 0.5,
        "lr": 1e-2,
        "mixup": 0.5,
        "cutmix": 0.5,
        "rotate": 10,
        "erasing": 0.5,
    }
    whole = Training(job(**settings)).run()
    cut = Training(job(**settings, device_batch=4)).run()
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(cut.model.state_dict()[name], tensor, atol=1e-6, rtol=1e-5)
    for a, b in zip(whole.history, cut.history, strict=True):
        measured = dict.fromkeys(("seconds", "images_per_second", "loader_share"), 0)
        assert a | measured == pytest.approx(b | measured, abs=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_search_in_passes_comes_to_the_same(job, strategy):
    settings = job(model="localvim_demo_search", drop_path=0, lr=1e-2).config()
    for name in ("directions", "pretrained", "start_from"):
        del settings[name]
    search = {"keep": 2, "choice_warmup": 0, "population": 3, "generations": 1}
    config = {**settings, "strategy": strategy, "candidates": ["h", "v", "w2"], **search}
    whole = SearchJob.from_config(config)
    cut = dataclasses.replace(whole, images=dataclasses.replace(whole.images, device_batch=4))
    (expected, first), (found, second) = ((r.run(), r) for r in (Search(whole), Search(cut)))
    torch.testing.assert_close(found.history, expected.history, atol=1e-5, rtol=1e-5)
    for name, tensor in first.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("batch_size", "device_batch", "devices", "passes"),
    [
        (1024, None, 8, (1, 128)),
        (1024, 64, 8, (2, 64)),
        (1024, 64, 1, (16, 64)),
        (8, 64, 2, (1, 4)),
    ],
)
def test_passes_of_a_step(batch_size, device_batch, devices, passes):
    settings = ImageSettings(batch_size=batch_size, device_batch=device_batch)
    assert settings.passes(devices) == passes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": 3}, "batch_size 16 is that of all 3 devices; allowed: multiples of 3"),
        (
            {"devices": 2, "device_batch": 3},
            "device_batch 3 does not divide a device's 8 images of a step; allowed: 1, 2, 4, 8",
        ),
    ],
)
def test_batches_that_cannot_be_shared_out(job, changes, message):
    with pytest.raises(ValueError, match=message):
        Training(job(**changes))
