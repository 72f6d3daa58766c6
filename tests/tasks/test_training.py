"""Trainings: determinism, what they leave, NaN, several ways to run."""

import csv
import dataclasses
import json
import signal

import pytest
import torch
from lightning.pytorch import Callback

from localmamba._signals import Stopped
from localmamba.data import Augmentation
from localmamba.data.module import ImageData
from localmamba.tasks.checkpoints import load_checkpoint
from localmamba.tasks.classification import make_mixup
from localmamba.tasks.evaluation import (
    evaluate,
    evaluate_model,
    load_evaluated,
    predict_files,
)
from localmamba.tasks.settings import Hardware
from localmamba.tasks.training import Training

CPU = Hardware("cpu")


def trained_weights(job, folder=None):
    return Training(job).run(folder).model.state_dict()


def test_one_seed_gives_the_same_weights(job):
    augmented = job(rotate=10, elastic=0.02, mixup=0.5, erasing=0.3, drop_path=0.2)
    first, again = trained_weights(augmented), trained_weights(augmented)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
    other = trained_weights(dataclasses.replace(augmented, seed=1))
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_training_learns(job):
    losses = [row["train_loss"] for row in Training(job(epochs=6, lr=1e-2)).run().history]
    assert losses[-1] < losses[0] - 0.02


def test_what_a_training_leaves(job, tmp_path):
    trained = Training(job(directions=["h", "w2_flip"])).run(tmp_path)
    trained.save(tmp_path)
    assert json.loads((tmp_path / "directions.json").read_text())["directions"] == [
        ["h", "w2_flip"]
    ]
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert list(rows[0]) == [
        "epoch", "lr", "train_loss", "val_accuracy", "val_loss", "images_per_second",
        "loader_share", "seconds",
    ]  # fmt: skip
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["split"] == "test"
    assert metrics["images"] == 20
    # No choice among epochs: the final figure is the last epoch's.
    assert metrics["accuracy"] == pytest.approx(float(rows[-1]["val_accuracy"]))


def test_checkpoint_evaluates_to_the_metrics_of_the_training(job, tmp_path):
    trained = Training(job(directions=["h", "v"])).run()
    trained.save(tmp_path)
    model, card = load_checkpoint(tmp_path / "model.safetensors")
    settings = job().images
    source, split = load_evaluated(card, "digits", settings, None)
    found = evaluate_model(model, ImageData(source, card.input, settings, evaluated=split), CPU)
    metrics = found.metrics()
    assert trained.card.metrics == pytest.approx({n: metrics[n] for n in trained.card.metrics})


def test_predictions_of_files_agree_with_the_evaluation(job, tmp_path):
    trained = Training(job(epochs=6, lr=1e-2)).run()
    examples = Training(job()).source.split("test")
    paths = []
    for i in range(len(examples)):
        paths.append(tmp_path / f"{i}.png")
        examples.image(i).save(paths[-1])
    card = trained.card
    found = predict_files(trained.model, card, paths, torch.device("cpu"), top=10)
    right = [
        prediction.classes[0] == card.classes[label]
        for prediction, label in zip(found, examples.labels, strict=True)
    ]
    assert sum(right) / len(right) == pytest.approx(card.metrics["accuracy"])


def test_probabilities_add_up_and_bad_files_stop_nothing(job, tmp_path):
    trained = Training(job()).run()
    (tmp_path / "bad.png").write_text("x")
    Training(job()).source.split("test").image(0).save(tmp_path / "good.png")
    paths = [tmp_path / "bad.png", tmp_path / "good.png", tmp_path / "none.png"]
    bad, good, none = predict_files(trained.model, trained.card, paths, torch.device("cpu"), 99)
    assert "cannot read" in bad.error
    assert "no such file" in none.error
    assert sum(good.probabilities) == pytest.approx(1)
    assert len(good.classes) == 10


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16-mixed"},
        {"ema": 0.9, "clip_grad": 1.0},
        {"cutmix": 1.0, "batch_size": 15},
        {"crop_scale": [0.5, 1.0], "auto_augment": "rand-m9-mstd0.5", "workers": 0},
        {"model": "test_vit", "model_args": {}, "image_size": 32},
        {"model": "localvim_demo_search"},
    ],
    ids=["bf16", "ema", "odd cutmix", "timm augmentation", "timm model", "supernet"],
)
def test_ways_to_train(job, changes):
    trained = Training(job(epochs=1, **changes)).run()
    assert trained.card.metrics["loss"] < 4
    assert all(tensor.isfinite().all() for tensor in trained.model.state_dict().values())


def test_running_average_is_what_is_kept(job):
    plain, average = (trained_weights(job(lr=1e-2, epochs=6, ema=ema)) for ema in (0.0, 0.99))
    start = Training(job(lr=1e-2)).model.state_dict()

    def way(weights):
        return (weights["head.weight"] - start["head.weight"]).norm()

    assert 0 < way(average) < 0.5 * way(plain)


def test_a_training_starts_from_a_supernet(job, tmp_path):
    args = {"embed_dim": 8, "depth": 1, "d_state": 2}
    search = Training(job(model="localvim_demo_search", model_args=args)).run()
    search.save(tmp_path)
    checkpoint = str(tmp_path / "model.safetensors")
    ready = Training(job(start_from=checkpoint, directions=["v", "w7"]))
    assert torch.equal(ready.model.pos_embed, search.model.pos_embed)


def test_mixup_gives_soft_targets():
    mix = make_mixup(Augmentation(mixup=1.0), num_classes=3)
    _, targets = mix(torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0]))
    assert torch.allclose(targets.sum(1), torch.ones(4))
    assert make_mixup(Augmentation(), 3) is None


def test_no_file_is_written_unasked(job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Training(job(epochs=1)).run()
    assert list(tmp_path.iterdir()) == []


class StopAfter(Callback):
    """Interrupts a training in the batch that follows so many."""

    def __init__(self, batches: int):
        self.batches = batches

    def on_train_batch_start(self, trainer, *_):
        if trainer.fit_loop.total_batch_idx == self.batches:
            raise Stopped(signal.SIGINT)


@pytest.mark.parametrize("data", ["tensors", "files", "passes"])
def test_a_training_that_was_stopped_comes_to_the_same(job, data, tmp_path, monkeypatch):
    by_image = {"crop_scale": [0.5, 1.0], "color_jitter": 0.3, "workers": 2}
    settings = job(
        rotate=10, mixup=0.5, erasing=0.3, drop_path=0.2, ema=0.9, clip_grad=1.0, save_steps=2,
        **(by_image if data == "files" else {}), device_batch=8 if data == "passes" else None,
    )  # fmt: skip
    whole = trained_weights(settings, tmp_path)
    rows = unmeasured(tmp_path)
    for steps in (2, 3, 5, 6):  # an epoch has 3
        folder = tmp_path / str(steps)
        folder.mkdir()
        if steps == 6:
            monkeypatch.setattr("localmamba.tasks.training.evaluate", interrupt)
        # Between two passes of a step, if it has two.
        batches = 2 * steps + 1 if data == "passes" else steps
        with pytest.raises(Stopped):
            Training(settings).run(folder, callbacks=(StopAfter(batches),))
        monkeypatch.setattr("localmamba.tasks.training.evaluate", evaluate)
        torch.manual_seed(99)
        trained = Training(settings).run(folder, resume=True)
        for name, tensor in trained.model.state_dict().items():
            assert torch.equal(tensor, whole[name]), (steps, name)
        assert unmeasured(folder) == rows, steps
        assert (folder / "state.pt").is_file()
        trained.save(folder)
        assert not list(folder.glob("state*"))


def unmeasured(folder):
    """Rows of metrics.csv without times."""
    rows = csv.DictReader((folder / "metrics.csv").open())
    return [
        {k: v for k, v in row.items() if "second" not in k and "share" not in k} for row in rows
    ]


def interrupt(*_):
    raise Stopped(signal.SIGINT)
