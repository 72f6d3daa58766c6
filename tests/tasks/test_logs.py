"""Logs of a training: TensorBoard and metrics.csv."""

import csv
import io

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from localmamba.tasks.callbacks import Tally
from localmamba.tasks.training import Training

MEASURED = ["images_per_second", "loader_share", "seconds"]


def test_a_run_logs_its_steps_and_epochs(job, tmp_path, monkeypatch):
    monkeypatch.setattr("localmamba.tasks.callbacks.LOG_STEPS", 2)
    ready = Training(job(device_batch=8, clip_grad=1e-3))  # 3 steps of 2 passes an epoch
    ready.run(tmp_path)
    log = EventAccumulator(str(tmp_path / "tensorboard"))
    log.Reload()
    entries = {tag: log.Scalars(tag) for tag in log.Tags()["scalars"]}
    for name in ("loss", "lr", "gradient_norm", "images_per_second", "loader_share"):
        assert [entry.step for entry in entries[f"step/{name}"]] == [2, 4, 6], name
    assert {"train_loss", "val_accuracy", "epoch/images_per_second"} <= entries.keys()
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert list(rows[0])[-3:] == MEASURED
    assert all(0 <= float(row["loader_share"]) < 1 for row in rows)
    # The steps 5 and 6 are of the second epoch, whose mean is over 4 to 6.
    mean, last = float(rows[1]["train_loss"]), entries["step/loss"][-1].value
    assert last == pytest.approx(mean, abs=0.1)
    # Of the whole gradient, before it is clipped.
    assert all(entry.value > 1e-2 for entry in entries["step/gradient_norm"])


def test_a_tally_counts_images_and_waiting(monkeypatch):
    monkeypatch.setattr("localmamba.tasks.callbacks.time.perf_counter", lambda: 14.0)
    tally = Tally(start=10.0)
    tally.add(waited=1.0, images=30)
    tally.add(waited=0.0, images=30)
    assert tally.figures() == {"images_per_second": 15.0, "loader_share": 0.25}
    assert not torch.cuda.is_initialized()


def test_lines_say_how_quick_an_epoch_was(job):
    console = Console(file=io.StringIO(), width=200)
    Training(job(epochs=1)).run(console=console)
    assert "images/s" in console.file.getvalue()
