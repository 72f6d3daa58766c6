"""Small runs for one process and for two. As a program, what each of two processes does."""

import os
import sys
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from localmamba.cli import main
from localmamba.data import Source
from localmamba.data.module import ImageData
from localmamba.data.sources import load_digits
from localmamba.search import STRATEGIES
from localmamba.tasks.classification import Classification
from localmamba.tasks.evaluation import evaluate_model
from localmamba.tasks.job import SearchJob, TrainingJob
from localmamba.tasks.search import Search
from localmamba.tasks.training import Training

COMMON = {
    "data": "digits", "model_args": {"embed_dim": 8, "depth": 2, "d_state": 2}, "epochs": 2,
    "warmup_epochs": 0, "drop_path": 0.0, "device": "cpu", "threads": 1,
    "rotate": 10.0, "shift": 0.1, "elastic": 0.02, "hflip": 0.5, "erasing": 0.5, "mixup": 0.5,
    "cutmix": 0.5, "batch_size": 16, "ema": 0.9, "clip_grad": 1.0,
}  # fmt: skip

SEARCH = {
    "model": "localvim_demo_search", "candidates": ("h", "v", "w2"), "keep": 2,
    "choice_warmup": 0.0, "population": 3, "generations": 1, "val_images": 11,
}  # fmt: skip


def few_digits() -> Source:
    """Returns 64 + 21 of the digits."""
    whole = load_digits()
    splits = {
        "train": whole.split("train").subset(range(64)),
        "test": whole.split("test").subset(range(21)),
    }
    return Source(whole.name, whole.classes, whole.channels, splits)


def results(**changes: Any) -> dict[str, dict[str, Any]]:
    """Returns weights and figures of a training and of a search by each strategy."""
    common = {**COMMON, **changes}
    with mock.patch("localmamba.data.sources.load_digits", return_value=few_digits()):
        ready = Training(TrainingJob.from_config({**common, "model": "localvim_demo"}))
        trained = ready.run()
        found = {"train": {"model": ready.model.state_dict(), "rows": ready.history.rows}}
        found["train"]["final"] = dict(trained.card.metrics) if trained is not None else {}
        test = ImageData(ready.source, ready.spec, ready.job.images, evaluated="test")
        evaluated = evaluate_model(ready.model, test, ready.job.hardware)
        found["train"]["evaluation"] = {
            "labels": torch.from_numpy(evaluated.labels),
            "predicted": torch.from_numpy(evaluated.ranked[:, 0]),
            "losses": torch.from_numpy(evaluated.losses),
        }
        for strategy in STRATEGIES:
            search = Search(SearchJob.from_config({**common, **SEARCH, "strategy": strategy}))
            searched = search.run()
            model = {**search.model.state_dict()}
            if searched is not None:
                model["probabilities"] = torch.tensor(searched.choice.probabilities)
            found[strategy] = {"model": model, "rows": search.history.rows}
    for run in found.values():
        for row in run["rows"]:
            for measured in ("seconds", "images_per_second", "loader_share"):
                row.pop(measured, None)
    return found


def fail_in_one_process() -> int:
    """Runs the command until one process fails in its second step."""

    def training_step(self: Classification, batch: Any, batch_idx: int) -> Tensor:
        if self.global_rank == 1 and batch_idx == 1:
            raise ValueError("process 1 fails on purpose")
        return step(self, batch, batch_idx)

    step = Classification.training_step
    words = ["train", "--model", "localvim_demo", "--devices", "2", "--output", "failed"]
    options = [f"--{key}={value}" for key, value in COMMON.items()]
    with mock.patch.object(Classification, "training_step", training_step):
        return main([*words, *options])


if __name__ == "__main__":
    torch.save(results(), f"rank{os.environ['RANK']}.pt")
    sys.exit(fail_in_one_process())
