"""Two processes on a CPU (gloo) do what one does."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = "import sys\nfrom localmamba.cli import main\nsys.exit(main())\n"

TINY = [
    "--data", "digits", "--model_args", "{embed_dim: 8, depth: 1, d_state: 2}", "--epochs", "1",
    "--warmup_epochs", "0", "--drop_path", "0", "--rotate", "0", "--shift", "0", "--zoom", "0",
    "--shear", "0", "--elastic", "0", "--device", "cpu", "--threads", "1", "--batch_size", "256",
]  # fmt: skip

SEARCH = [
    "search", "--model", "localvim_demo_search", "--candidates", "h", "v", "w2", "--keep", "2",
    "--choice_warmup", "0", "--population", "3", "--generations", "1", "--val_images", "101",
]  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--model", "localvim_demo"],
        [*SEARCH, "--strategy", "binary_gates"],
        [*SEARCH, "--strategy", "single_path"],
    ],
    ids=["train", "binary_gates", "single_path"],
)
def test_two_processes_come_to_what_one_does(command, tmp_path, run):
    # Lightning starts the other process by the name of the script.
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    words = [*command, *TINY, "--devices", "2", "--output", "two"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), *words], cwd=tmp_path, env=environment, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nin two:") == 1  # the other process says nothing
    threads = torch.get_num_threads()
    assert run(*command, *TINY, "--output", "one").code == 0
    torch.set_num_threads(threads)
    name = "model.safetensors" if command[0] == "train" else "supernet.safetensors"
    one, two = (load_file(tmp_path / folder / name) for folder in ("one", "two"))
    for key, tensor in one.items():
        assert torch.allclose(tensor, two[key], atol=1e-4), key
    first, second = (json.loads(Path(f, "metrics.json").read_text()) for f in ("one", "two"))
    if command[0] == "train":
        assert second["images"] == 359
        assert second["loss"] == pytest.approx(first["loss"], abs=1e-4)
        assert second["accuracy"] == pytest.approx(first["accuracy"], abs=0.01)
    else:
        assert second["entropy"] == pytest.approx(first["entropy"], abs=1e-3)
        assert second["train_loss"] == pytest.approx(first["train_loss"], abs=1e-4)


def test_two_processes_evaluate_every_image_once(run, trained, photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "images")
    (folder / "red" / "03.png").unlink()  # 23 images: the processes have different numbers
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    words = ["evaluate", "--checkpoint", trained / "model.safetensors", "--data", folder]
    words = [*map(str, words), "--device", "cpu", "--batch_size", "4", "--workers", "0"]
    done = subprocess.run(
        [sys.executable, str(script), *words, "--devices", "2", "--output", "two"],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nin two:") == 1
    assert run(*words, "--output", "one").code == 0
    one, two = (json.loads(Path(f, "metrics.json").read_text()) for f in ("one", "two"))
    assert two["images"] == 23
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    first, second = (Path(f, "predictions.csv").read_text().splitlines() for f in ("one", "two"))
    assert [line.rsplit(",", 1)[0] for line in first] == [s.rsplit(",", 1)[0] for s in second]
