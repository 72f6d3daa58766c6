"""Sharded training by one of several processes, started by test_sharding.py."""

import sys
from pathlib import Path
from unittest import mock

from lightning.pytorch import Callback
from several import COMMON, few_digits

from localmamba.tasks.job import TrainingJob
from localmamba.tasks.training import Training

JOB = {**COMMON, "model": "localvim_demo", "ema": 0.0, "parallel": "fsdp", "save_steps": 2}


class StopAfter(Callback):
    """Interrupts a training in the step that follows so many."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.steps:
            raise RuntimeError("stopped")


def train(folder: Path, stop: int | None = None, **changes: str) -> None:
    """Goes on from the state in the folder; stops after so many steps, or leaves the weights."""
    callbacks = () if stop is None else (StopAfter(stop),)
    with mock.patch("localmamba.data.sources.load_digits", return_value=few_digits()):
        try:
            trained = Training(TrainingJob.from_config({**JOB, **changes})).run(
                folder, resume=True, callbacks=callbacks
            )
        except RuntimeError:
            if stop is None:
                raise
            return
    if trained is not None:
        trained.save(folder)


if __name__ == "__main__":
    start, *folders, device, parallel = sys.argv[1:]
    changes = {"device": device, "parallel": parallel}
    if start == "start":
        train(Path(folders[0]), **changes)
        train(Path(folders[1]), stop=5, **changes)
    else:
        train(Path(folders[0]), **changes)
