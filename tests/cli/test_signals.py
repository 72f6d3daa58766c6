"""Signals that ask to stop: the state is saved after the step, the exit code names the signal."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from localmamba.cli import main
from localmamba.tasks.callbacks import ProgressDisplay
from localmamba.tasks.state import read_state

TRAIN = [
    "train", "--data", "digits", "--model", "localvim_demo", "--epochs", "2", "--warmup-epochs",
    "0", "--model_args", "{embed_dim: 8, depth: 1, d_state: 2}", "--batch-size", "256", "--device",
    "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, torch.Tensor]:
    """Weights of an undisturbed run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert main([*TRAIN, "--output", str(folder)]) == 0
    return load_file(folder / "model.safetensors")


def kill_at(monkeypatch, hook: str, call: int, *numbers: int) -> None:
    """Sends signals to this process in a call of a callback's hook."""
    calls = iter(range(1, call + 1))

    def kill(*_) -> None:
        if next(calls, 0) == call:
            for number in numbers:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(ProgressDisplay, hook, kill)


@pytest.mark.parametrize(
    ("name", "code", "hook", "call", "step"),
    [
        ("SIGINT", 130, "on_train_batch_end", 3, 3),
        ("SIGUSR1", 138, "on_train_batch_end", 5, 5),  # the last of the epoch
        ("SIGTERM", 143, "on_validation_batch_end", 1, 5),
    ],
)
def test_a_signal_saves_and_the_resumed_run_ends_as_an_undisturbed_one(
    run, weights, tmp_path, monkeypatch, name, code, hook, call, step
):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        kill_at(patch, hook, call, signal.Signals[name])
        said = run(*TRAIN, "--output", "stopped")
    note = f"step {step} is saved, --resume goes on from it"
    assert (said.code, said.err) == (code, f"localmamba train: stopped by {name}; {note}\n")
    assert read_state(tmp_path / "stopped" / "state.pt")["global_step"] == step
    assert run(*TRAIN, "--output", "stopped", "--resume").code == 0
    found = load_file(tmp_path / "stopped" / "model.safetensors")
    assert all(torch.equal(tensor, found[key]) for key, tensor in weights.items())
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_a_second_signal_stops_at_once(run, monkeypatch):
    kill_at(monkeypatch, "on_train_batch_end", 2, signal.SIGINT, signal.SIGINT)
    said = run(*TRAIN, "--output", "o")
    assert (said.code, said.err) == (130, "localmamba train: stopped by SIGINT\n")
    assert not Path("o", "state.pt").exists()


def test_before_the_training_nothing_is_waited_for(run, monkeypatch):
    monkeypatch.setattr(
        "localmamba.tasks.training.check_trainable", lambda _: os.kill(os.getpid(), signal.SIGUSR1)
    )
    said = run(*TRAIN, "--output", "o")
    assert (said.code, said.err) == (138, "localmamba train: stopped by SIGUSR1\n")
    assert not Path("o").exists()


def test_a_signal_to_every_process_of_a_search_that_has_workers(photos, tmp_path):
    code = "import sys; from localmamba.cli import main; sys.exit(main())"
    words = [
        "search", "--data", str(photos), "--model", "localvim_demo_search", "--epochs", "9999",
        "--model_args", "{embed_dim: 8, depth: 1, d_state: 2}", "--warmup-epochs", "0",
        "--batch-size", "4", "--device", "cpu", "--workers", "2", "--output", str(tmp_path / "o"),
    ]  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-c", code, *words], stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        while not (tmp_path / "o" / "metrics.csv").exists() and process.poll() is None:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        _, said = process.communicate()
    assert process.returncode == 143, said
    assert b"search: stopped by SIGTERM; step" in said
    assert said.count(b"\n") == 1
    assert (tmp_path / "o" / "state.pt").exists()


def test_a_worker_of_the_data_outlives_sigterm_but_ends():
    """multiprocessing waits for workers that it has sent SIGTERM."""
    program = (
        "import os, signal, time; from localmamba import _signals; _signals.WORKER_SECONDS = 1; "
        "_signals.ignore_signals(0); os.kill(os.getpid(), signal.SIGTERM); print('goes on'); "
        "time.sleep(30)"
    )
    done = subprocess.run([sys.executable, "-uc", program], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("goes on\n", -signal.SIGALRM)
