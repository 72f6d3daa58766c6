"""Trainings through torch.compile and CUDA graphs do what eager ones do."""

import signal
import warnings

import pytest
import torch
from lightning.pytorch import Callback

pytest.importorskip("sklearn")

from localmamba._signals import Stopped
from localmamba.tasks.job import SearchJob, TrainingJob
from localmamba.tasks.search import Search
from localmamba.tasks.training import Training

STEPS = 22
"""Steps of an epoch of 1438 digits in batches of 64."""

DEMO = {"depth": 2, "embed_dim": 64}


def config(**changes) -> dict:
    basic = {
        "data": "digits", "model": "localvim_demo", "model_args": DEMO, "epochs": 1,
        "warmup_epochs": 0, "batch_size": 64, "lr": 1e-3, "drop_path": 0.0, "device": "cuda",
    }  # fmt: skip
    return {**basic, **changes}


class Losses(Callback):
    """Notes the loss of every batch, on the GPU."""

    def __init__(self):
        self.noted = []

    def on_train_batch_end(self, trainer, module, outputs, *_):
        del trainer, module
        self.noted.append(outputs["loss"].clone())

    def read(self) -> torch.Tensor:
        return torch.stack(self.noted).float().cpu()


def losses(**changes) -> torch.Tensor:
    noted = Losses()
    Training(TrainingJob.from_config(config(**changes))).run(callbacks=(noted,))
    return noted.read()


@pytest.mark.parametrize(
    ("model", "launch"),
    [("localvim_demo", "compile"), ("localvim_demo", "graph"), ("localvmamba_demo", "graph")],
)
def test_losses_are_those_of_eager_launches(model, launch):
    args = DEMO if model == "localvim_demo" else {}
    eager, other = (losses(model=model, model_args=args, launch=name) for name in ("eager", launch))
    assert len(eager) == STEPS
    assert eager[-5:].mean() < eager[:5].mean()
    torch.testing.assert_close(other, eager, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("device_batch", [None, 16])
def test_everything_a_recipe_has(precision, device_batch):
    """Mixup, CutMix, erasing, drop path, clipping, average of the weights, passes, a scaler."""
    recipe = {
        "mixup": 0.2, "cutmix": 1.0, "erasing": 0.25, "hflip": 0.5, "drop_path": 0.2, "ema": 0.9,
        "clip_grad": 0.1, "precision": precision, "device_batch": device_batch,
    }  # fmt: skip
    eager, graph = (
        Training(TrainingJob.from_config(config(**recipe, launch=name))).run()
        for name in ("eager", "graph")
    )
    loss = [trained.card.metrics["loss"] for trained in (eager, graph)]
    assert loss[1] == pytest.approx(loss[0], abs=1e-3 if precision == "32" else 0.05)
    if precision == "32":
        for name, tensor in eager.model.state_dict().items():
            torch.testing.assert_close(graph.model.state_dict()[name], tensor, atol=2e-3, rtol=1e-2)


def test_clipping_acts_on_the_gradients_of_a_graph():
    # So small that AdamW's epsilon stops the training.
    free, clipped = (losses(launch="graph", lr=1e-2, clip_grad=clip) for clip in (None, 1e-7))
    assert free[0] == pytest.approx(clipped[0].item(), abs=1e-5)
    assert clipped[0] - clipped[-5:].mean() < 0.5 * (free[0] - free[-5:].mean())


def test_the_average_is_kept_and_the_weights_go_on():
    plain, average = (
        Training(TrainingJob.from_config(config(launch="graph", lr=1e-2, ema=ema))).run().model
        for ema in (0.0, 0.999)
    )
    start = Training(TrainingJob.from_config(config(device="cpu"))).model.head.weight
    way = [(model.head.weight.cpu() - start).norm() for model in (plain, average)]
    assert 0 < way[1] < 0.5 * way[0]


def test_drop_path_draws_anew_in_every_replay():
    # One batch of all images, and weights that stay: losses differ by what is dropped.
    still = {"batch_size": 1438, "lr": 1e-12, "weight_decay": 0, "epochs": 8, "min_lr": 0}
    still |= {"warmup_lr": 0, "launch": "graph"}
    dropped = losses(**still, drop_path=0.5)
    assert len(dropped) == 8
    assert dropped.std() > 20 * losses(**still).std()
    assert len(dropped.unique()) == 8
    torch.testing.assert_close(losses(**still, drop_path=0.5), dropped, atol=1e-5, rtol=1e-5)


class StopAfter(Callback):
    """Interrupts a training in the batch that follows so many."""

    def __init__(self, batches: int):
        self.batches = batches

    def on_train_batch_start(self, trainer, *_):
        if trainer.fit_loop.total_batch_idx == self.batches:
            raise Stopped(signal.SIGINT)


@pytest.mark.parametrize("device_batch", [None, 32])
def test_a_graph_training_that_was_stopped_comes_to_the_same(device_batch, tmp_path):
    job = TrainingJob.from_config(
        config(
            launch="graph", drop_path=0.3, mixup=0.5, ema=0.9, clip_grad=1.0, save_steps=4,
            epochs=2, device_batch=device_batch,
        )
    )  # fmt: skip
    whole = Training(job).run()
    passes = 2 if device_batch else 1
    for batches in (5 * passes + passes - 1, (STEPS + 9) * passes):
        folder = tmp_path / str(batches)
        folder.mkdir()
        with pytest.raises(Stopped):
            Training(job).run(folder, callbacks=(StopAfter(batches),))
        again = Training(job).run(folder, resume=True)
        for name, tensor in whole.model.state_dict().items():
            torch.testing.assert_close(
                again.model.state_dict()[name], tensor, atol=1e-6, rtol=1e-5, msg=name
            )


def test_the_papers_search_as_a_graph():
    search = {"model": "localvim_demo_search", "candidates": ["h", "v", "w2"], "keep": 2}
    jobs = [
        SearchJob.from_config(config(**search, launch=name, epochs=2))
        for name in ("eager", "graph")
    ]
    eager, graph = (Search(job).run() for job in jobs)
    torch.testing.assert_close(
        torch.tensor(graph.history), torch.tensor(eager.history), atol=1e-4, rtol=1e-3
    )


class Waits(Callback):
    """Notes where a step waits for the GPU."""

    def __init__(self):
        self.counts = []

    def on_train_batch_start(self, *_):
        self.catcher = warnings.catch_warnings(record=True)
        self.seen = self.catcher.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")

    def on_train_batch_end(self, *_):
        torch.cuda.set_sync_debug_mode("default")
        self.counts.append([str(w.message) for w in self.seen if "synchroniz" in str(w.message)])
        self.catcher.__exit__(None, None, None)


@pytest.mark.parametrize("launch", ["eager", "graph"])
def test_a_step_does_not_wait_for_the_gpu(launch):
    waits = Waits()
    job = TrainingJob.from_config(config(launch=launch, ema=0.9, clip_grad=1.0, mixup=0.2))
    Training(job).run(callbacks=(waits,))
    # Where the check of the loss reads the flags of the batch before.
    assert all(len(found) <= 1 for found in waits.counts[10:15]), waits.counts[10:15]
