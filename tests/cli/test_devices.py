"""The command starts several processes itself; what they come to is in tests/tasks."""

import json
import shutil
from pathlib import Path

import pytest


def test_two_processes_evaluate_every_image_once(run, trained, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = shutil.copytree(photos, tmp_path / "images")
    (folder / "red" / "03.png").unlink()  # 23 images: the processes have different numbers
    words = ["evaluate", "--checkpoint", trained / "model.safetensors", "--data", folder]
    words = [*map(str, words), "--device", "cpu", "--batch_size", "4", "--workers", "0"]
    assert run(*words, "--devices", "2", "--output", "two").code == 0
    assert run(*words, "--output", "one").code == 0
    one, two = (json.loads(Path(f, "metrics.json").read_text()) for f in ("one", "two"))
    assert two["images"] == 23
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    first, second = (Path(f, "predictions.csv").read_text().splitlines() for f in ("one", "two"))
    assert [line.rsplit(",", 1)[0] for line in first] == [s.rsplit(",", 1)[0] for s in second]
