"""`localmamba search` on digits: one seed, one file, in another process and after a stop too."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from localmamba.search import STRATEGIES, Choice

SEARCH = [
    "search", "--data", "digits", "--model", "localvim_demo_search", "--seed", "3",
    "--model_args", "{embed_dim: 8, depth: 2, d_state: 2}", "--candidates", "h", "v", "w2",
    "--keep", "2", "--choice-warmup", "0", "--epochs", "2", "--warmup-epochs", "0",
    "--batch-size", "256", "--population", "4", "--generations", "2", "--device", "cpu",
]  # fmt: skip

FILES = ("directions.json", "probabilities.csv")


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resumed_search_leaves_the_same_files(run, strategy, tmp_path, monkeypatch):
    options = [*SEARCH, "--strategy", strategy]
    assert run(*options, "--output", "whole").code == 0
    with monkeypatch.context() as patch:
        steps = iter(range(6))  # an epoch has 4 or 5

        def step(*_) -> None:
            if next(steps, None) is None:
                os.kill(os.getpid(), signal.SIGINT)

        patch.setattr("localmamba.tasks.callbacks.ProgressDisplay.on_train_batch_end", step)
        said = run(*options, "--output", "stopped")
    assert said.code == 130
    assert "stopped by SIGINT; step" in said.err
    assert Choice.load(tmp_path / "stopped" / "directions.json").epoch == 1
    assert run(*options, "--output", "stopped", "--resume").code == 0
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    assert "the run in stopped has ended" in run(*options, "--output", "stopped", "--resume").out


def test_one_seed_gives_one_file_in_every_process(run, tmp_path):
    assert run(*SEARCH, "--output", "one").code == 0
    code = "import sys; from localmamba.cli import main; sys.exit(main())"
    words = [sys.executable, "-c", code, *SEARCH, "--output", "other"]
    # With as many threads: how a sum is shared among them decides its last bits.
    other = {**os.environ, "PYTHONHASHSEED": "5", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run(words, cwd=tmp_path, env=other, check=True, capture_output=True)
    assert contents(tmp_path / "other") == contents(tmp_path / "one")
    assert run(*SEARCH, "--seed", "4", "--output", "third").code == 0
    assert contents(tmp_path / "third") != contents(tmp_path / "one")
