"""A search from its job to its files: the same again with one seed, and after a stop."""

import csv
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")

from lightning.pytorch import Callback

from localmamba._signals import Stopped
from localmamba.data import Augmentation, ImageSettings
from localmamba.search import STRATEGIES, Choice, SearchSettings
from localmamba.tasks.job import SearchJob
from localmamba.tasks.search import Search, read_probabilities, write_probabilities
from localmamba.tasks.settings import Hardware, Saving, TrainingSettings

TINY = {"depth": 2, "embed_dim": 8, "d_state": 2}


def make_job(strategy: str = "softmax", **changes) -> SearchJob:
    fields = {
        "data": "digits",
        "model": "localvim_demo_search",
        "candidates": ("h", "v", "w2", "snake_flip"),
        "strategy": strategy,
        "model_args": TINY,
        "search": SearchSettings(
            keep=2, choice_warmup=0.0, population=4, generations=2, val_images=64
        ),
        "images": ImageSettings(batch_size=256),
        "augmentation": Augmentation(rotate=10, shift=0.1),
        "training": TrainingSettings(epochs=2, warmup_epochs=0.5, lr=3e-3),
    }
    return SearchJob(**fields | changes)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_seed_gives_one_file_bit_for_bit(strategy, tmp_path):
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
        Search(make_job(strategy)).run(folder)
    one, other = ((folder / "directions.json").read_bytes() for folder in folders)
    assert one == other
    assert str(tmp_path).encode() not in one


class StopAfter(Callback):
    """Interrupts a training in the step that follows so many."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_train_batch_start(self, trainer, *_) -> None:
        if trainer.fit_loop.total_batch_idx == self.steps:
            raise Stopped(signal.SIGINT)


def contents(folder: Path) -> dict[str, bytes]:
    """Files without times and folders."""
    skipped = ("metrics.csv", "metrics.json", "config.yaml", "tensorboard")
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in skipped}


def losses(folder: Path) -> list[str]:
    with (folder / "metrics.csv").open() as file:
        return [row["train_loss"] for row in csv.DictReader(file)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resumed_search_comes_to_the_same(strategy, tmp_path):
    settings = TrainingSettings(epochs=2, warmup_epochs=0.5, ema=0.9)
    job = make_job(strategy, training=settings, saving=Saving(save_steps=2))
    whole = tmp_path / "whole"
    whole.mkdir()
    Search(job).run(whole)
    per_epoch = 4 if STRATEGIES[strategy].uses_holdout else 5
    # In the middle of both epochs, a step after the last saved one, and after the last epoch.
    for steps in (3, per_epoch, per_epoch + 3, 2 * per_epoch):
        stopped = tmp_path / f"stopped after {steps}"
        stopped.mkdir()
        first = Search(job)
        first.strategy.conclude = interrupt
        with pytest.raises(Stopped):
            first.run(stopped, callbacks=(StopAfter(steps),))
        if steps >= per_epoch:
            early = Choice.load(stopped / "directions.json")
            assert (early.epoch, early.epochs) == (steps // per_epoch, 2)
        torch.manual_seed(99)
        Search(job).run(stopped, resume=True)
        assert contents(stopped) == contents(whole), steps
        assert losses(stopped) == losses(whole), steps


def interrupt(*_args) -> None:
    raise Stopped(signal.SIGINT)


def test_a_search_that_diverges_says_so(tmp_path):
    job = make_job(training=TrainingSettings(epochs=2, warmup_epochs=0, lr=1e30))
    with pytest.raises(ValueError, match=r"loss is no longer finite \(epoch 1, step \d\); try a s"):
        Search(job).run(tmp_path)


def test_a_state_of_another_search_is_refused(tmp_path):
    with pytest.raises(Stopped):
        Search(make_job()).run(tmp_path, callbacks=(StopAfter(7),))
    with pytest.raises(ValueError, match="of a search with other settings: seed was 0, now 1"):
        Search(make_job(seed=1)).run(tmp_path, resume=True)


def test_files_of_a_search(tmp_path):
    searched = Search(make_job()).run(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "directions.json", "probabilities.csv", "metrics.csv", "metrics.json", "config.yaml",
        "supernet.safetensors", "tensorboard",
    }  # fmt: skip
    history, candidates = read_probabilities(tmp_path / "probabilities.csv")
    assert candidates == ["h", "v", "w2", "snake_flip"]
    assert np.array_equal(history, searched.history)
    assert history.shape == (2, 2, 4)
    assert json.loads((tmp_path / "metrics.json").read_text())["seconds"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "magic"}, "known: .*binary_gates"),
        ({"candidates": ("h",)}, "keep must be 1 to 1"),
        ({"hardware": Hardware(precision="16-mixed")}, "precision 32 or bf16-mixed"),
        ({"chunk_size": -1}, "chunk_size must be at least 0"),
    ],
)
def test_jobs_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_job(**changes)


def test_job_comes_back_from_its_config():
    job = make_job()
    assert SearchJob.from_config(job.config()).config() == job.config()


def test_probabilities_come_back_as_they_were(tmp_path):
    history = np.random.default_rng(0).random((3, 2, 4))
    path: Path = tmp_path / "probabilities.csv"
    write_probabilities(path, history, ["h", "v", "w2", "w7"])
    found, candidates = read_probabilities(path)
    assert np.array_equal(found, history)
    assert candidates == ["h", "v", "w2", "w7"]
    path.write_text("nothing")
    with pytest.raises(ValueError, match="does not hold the probabilities"):
        read_probabilities(path)
