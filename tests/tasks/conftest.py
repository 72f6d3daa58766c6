"""Trainings small enough for a test."""

from typing import Any

import pytest

from localmamba.data import Source
from localmamba.data.sources import load_digits
from localmamba.tasks.job import TrainingJob


@pytest.fixture
def job(monkeypatch):
    """Makes jobs on 48 + 20 of the digits; keywords change the settings."""
    whole = load_digits()
    splits = {
        "train": whole.split("train").subset(range(48)),
        "test": whole.split("test").subset(range(20)),
    }
    few = Source(whole.name, whole.classes, whole.channels, splits)
    monkeypatch.setattr("localmamba.data.sources.load_digits", lambda: few)

    def make(**changes: Any) -> TrainingJob:
        config = {
            "data": "digits",
            "model": "localvim_demo",
            "model_args": {"embed_dim": 8, "depth": 1, "d_state": 2},
            "epochs": 2,
            "warmup_epochs": 0,
            "batch_size": 16,
            "device": "cpu",
        }
        return TrainingJob.from_config({**config, **changes})

    return make
