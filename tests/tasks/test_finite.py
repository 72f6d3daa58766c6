"""Losses that are not finite: the run stops and leaves the pass, or skips the step."""

import csv

import pytest
import torch

from localmamba.tasks.finite import FILE, FiniteCheck, reproduce
from localmamba.tasks.training import Training


def spoil(ready: Training, *batches: int) -> None:
    """Makes the images of some batches infinite after their check, so that their loss is NaN."""
    calls, forward = iter(range(10**6)), ready.model.forward_features
    if batches:
        ready.model.forward_features = lambda x: forward(
            x * torch.where(torch.tensor(next(calls) in batches), torch.inf, 1.0)
        )


def test_nan_in_the_input_is_named(job, tmp_path, monkeypatch):
    ready = Training(job())
    monkeypatch.setattr(ready.data, "augment", lambda images, *_: images.float() * float("nan"))
    with pytest.raises(ValueError, match=r"the input holds NaN or infinity \(epoch 1, step 1\)"):
        ready.run(tmp_path)


def test_a_loss_that_diverges_is_named_and_reproduced(job, tmp_path):
    ready = Training(job(lr=1e30, mixup=0.5, drop_path=0.5, rotate=10))
    message = r"loss is no longer finite \(epoch 1, step 2\); try a smaller .*nonfinite.pt holds"
    with pytest.raises(ValueError, match=message) as caught:
        ready.run(tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("state*"))
    first, again = reproduce(tmp_path / FILE), reproduce(tmp_path / FILE)
    assert not first.isfinite()
    assert torch.equal(first.nan_to_num(), again.nan_to_num())
    weights = torch.load(tmp_path / FILE, weights_only=True)["weights"]
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_reproduce_gives_the_loss_of_the_pass(job, tmp_path, monkeypatch):
    ready = Training(job(mixup=0.5, drop_path=0.5, rotate=10, precision="bf16-mixed"))
    losses, note = [], FiniteCheck.note

    def spoiled(self, images, targets, loss, where, seeds):
        losses.append(loss.detach().clone())
        note(self, images, targets, loss.detach() / (len(losses) < 3), where, seeds)

    monkeypatch.setattr(FiniteCheck, "note", spoiled)
    with pytest.raises(ValueError, match="epoch 1, step 3"):
        ready.run(tmp_path)
    assert torch.equal(reproduce(tmp_path / FILE).detach(), losses[2])


def test_skipped_steps_change_nothing_and_are_counted(job, tmp_path):
    ready = Training(job(skip_nonfinite=2, ema=0.9))
    spoil(ready, 1, 2)
    trained = ready.run(tmp_path)
    assert all(tensor.isfinite().all() for tensor in trained.model.state_dict().values())
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["skipped_steps"] for row in rows] == ["2.0", "2.0"]
    assert all(float(row["train_loss"]) < 4 for row in rows)


def test_one_more_than_allowed_stops(job, tmp_path):
    ready = Training(job(skip_nonfinite=1))
    spoil(ready, 0, 2)
    with pytest.raises(ValueError, match=r"loss is no longer finite \(epoch 1, step 3\)"):
        ready.run(tmp_path)
    assert (tmp_path / FILE).is_file()
