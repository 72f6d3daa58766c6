"""A search from its job to its files: the same again with one seed, and after a stop."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")

from localmamba.data import Augmentation, ImageSettings
from localmamba.search import STRATEGIES, Choice, SearchSettings
from localmamba.tasks.search import Search
from localmamba.tasks.search_job import SearchJob
from localmamba.tasks.search_report import read_probabilities, write_probabilities
from localmamba.tasks.settings import TrainingSettings

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


def stop_after(search: Search, epochs: int, folder: Path) -> None:
    """Runs a search and interrupts it in the step that follows so many epochs."""

    def stop(*_args) -> None:
        raise KeyboardInterrupt

    def step_or_stop(batch) -> torch.Tensor:
        return stop() if search.loop.progress.epoch == epochs else loss(batch)

    loss, search.loop.loss = search.loop.loss, step_or_stop
    search.loop.strategy.conclude = stop
    with pytest.raises(KeyboardInterrupt):
        search.run(folder)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resumed_search_comes_to_the_same(strategy, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    Search(make_job(strategy)).run(whole)
    names = {path.name for path in whole.iterdir()} - {"metrics.csv", "metrics.json"}  # times
    for epochs in (1, 2):
        stopped = tmp_path / f"stopped after {epochs}"
        stopped.mkdir()
        stop_after(Search(make_job(strategy)), epochs, stopped)
        early = Choice.load(stopped / "directions.json")
        assert (early.epoch, early.epochs) == (epochs, 2)
        torch.manual_seed(99)
        Search(make_job(strategy)).run(stopped, resume=True)
        for name in names:
            assert (stopped / name).read_bytes() == (whole / name).read_bytes(), (name, epochs)


def test_files_of_a_search(tmp_path):
    searched = Search(make_job()).run(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "directions.json", "probabilities.csv", "metrics.csv", "metrics.json",
        "supernet.safetensors",
    }  # fmt: skip
    history, candidates = read_probabilities(tmp_path / "probabilities.csv")
    assert candidates == ["h", "v", "w2", "snake_flip"]
    assert np.array_equal(history, searched.history)
    assert history.shape == (2, 2, 4)
    assert json.loads((tmp_path / "metrics.json").read_text())["seconds"] > 0


def test_nothing_to_resume(tmp_path):
    with pytest.raises(ValueError, match="nothing to resume"):
        Search(make_job()).run(tmp_path, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "magic"}, "known: binary_gates"),
        ({"candidates": ("h",)}, "keep must be 1 to 1"),
        ({"training": TrainingSettings(ema=0.9)}, "ema must be 0"),
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
