"""Several processes: they come to what one does, and end together."""

import signal
import subprocess
import sys
import time
from importlib import util
from pathlib import Path

import pytest
import torch

from localmamba.cli import main
from localmamba.data.sampling import batch_places
from localmamba.tasks.processes import count_processes, run_processes
from localmamba.tasks.settings import Hardware

PROGRAM = Path(__file__).with_name("several.py")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_two_processes_come_to_what_one_does(tmp_path, monkeypatch, capfd):
    """With augmentation, mixup, CutMix, an average of the weights, and every search strategy."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    code = run_processes([sys.executable, str(PROGRAM)], 2)
    # The program ends with an error of process 1, in a step for which process 0 waits.
    said = capfd.readouterr()
    assert (code, said.err) == (2, "localmamba train: process 1 fails on purpose\n")
    assert not Path("failed/model.safetensors").exists()
    spec = util.spec_from_file_location("several", PROGRAM)
    several = util.module_from_spec(spec)
    spec.loader.exec_module(several)
    one = several.results()
    for rank in (0, 1):
        two = torch.load(f"rank{rank}.pt", weights_only=True)
        for name, run in one.items():
            for key, tensor in two[name]["model"].items():
                assert torch.allclose(tensor, run["model"][key], rtol=0, atol=1e-6), (name, key)
            for first, second in zip(run["rows"], two[name]["rows"], strict=True):
                assert second == pytest.approx(first, abs=1e-6), name
    first = torch.load("rank0.pt", weights_only=True)["train"]
    for process in (first, two["train"]):  # 21 images, each counted once
        for name, expected in one["train"]["evaluation"].items():
            torch.testing.assert_close(process["evaluation"][name], expected, rtol=0, atol=1e-5)
    assert two["train"]["final"] == {}  # the last evaluation is given to the first process
    assert first["final"] == pytest.approx(one["train"]["final"], abs=1e-6)


@pytest.mark.parametrize("command", ["train --model localvim_demo", "evaluate --checkpoint x"])
def test_the_command_starts_its_processes(command, monkeypatch):
    started = []
    monkeypatch.setattr("localmamba.cli.run_processes", lambda *args: started.append(args) or 7)
    words = [*command.split(), "--data", "digits", "--devices", "3"]
    assert main(words) == 7
    assert started == [([sys.executable, "-m", "localmamba.cli", *words], 3)]


@pytest.mark.parametrize(
    ("body", "code", "error"),
    [
        (
            "open(os.environ['LOCALMAMBA_ERRORS'], 'w').write('one line'); sys.exit(5)",
            5,
            "one line",
        ),
        ("os.abort()", 134, "process 1 ended with code -6\n"),
    ],
    ids=["error", "signal"],
)
def test_a_process_that_fails_ends_the_others(body, code, error, capfd):
    text = f"""if True:
        import os, sys, time
        if os.environ["RANK"] == "1":
            {body}
        time.sleep(300)"""
    start = time.monotonic()
    assert run_processes([sys.executable, "-c", text], 3) == code
    assert time.monotonic() - start < 200
    assert capfd.readouterr().err == error


def test_a_signal_reaches_every_process(tmp_path):
    """And none is killed before it has done what it does at the signal."""
    worker = """if True:
        import os, signal, sys, time
        def stop(*_):
            time.sleep(int(os.environ["RANK"]))
            open(os.environ["RANK"], "w").close()
            sys.exit(143)
        signal.signal(signal.SIGTERM, stop)
        open("ready" + os.environ["RANK"], "w").close()
        time.sleep(300)"""
    parent = f"""if True:
        import sys
        from localmamba.tasks.processes import run_processes
        sys.exit(run_processes([sys.executable, "-c", {worker!r}], 2))"""
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=tmp_path)
    while not {"ready0", "ready1"} <= {path.name for path in tmp_path.iterdir()}:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=200) == 143
    assert {"0", "1"} <= {path.name for path in tmp_path.iterdir()}


TORCHRUN = {"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}
SRUN = {"SLURM_NTASKS": "8", "SLURM_NNODES": "2"}


@pytest.mark.parametrize("variables", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
def test_a_launcher_says_how_many_there_are(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert count_processes(Hardware()) == count_processes(Hardware(devices=4)) == (4, 2)
    with pytest.raises(ValueError, match=r"devices 3: .* has started 4 processes on each node"):
        count_processes(Hardware(devices=3))


def test_alone_the_settings_say_how_many_there_are(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert count_processes(Hardware(devices=3)) == (3, 1)


@pytest.mark.parametrize(("size", "count"), [(4, 2), (5, 3), (1, 2)])
def test_places_of_the_processes_are_those_of_one_batch(size, count):
    places = [batch_places(size, rank, count) for rank in range(count)]
    assert sorted(p for part in places for p in part) == list(range(size * count))
    if size % 2 == 0:  # the reverse of a part is a part of the reverse
        for part in places:
            assert (size * count - 1 - part == part[::-1]).all()
