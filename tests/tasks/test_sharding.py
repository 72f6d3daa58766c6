"""Sharded training (FSDP2): as without, and states that load on any number of processes."""

import csv
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from localmamba.tasks.job import SearchJob, TrainingJob
from localmamba.tasks.processes import run_processes
from localmamba.tasks.settings import Hardware
from localmamba.tasks.state import find_state
from localmamba.tasks.training import Training

sys.path.append(str(Path(__file__).parent))
from several import few_digits
from sharded import JOB

PROGRAM = [sys.executable, str(Path(__file__).with_name("sharded.py"))]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of a training by two processes, and of the same stopped in its sixth step."""
    folders = [tmp_path_factory.mktemp(name) for name in ("whole", "stopped")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        assert run_processes([*PROGRAM, "start", *map(str, folders), "cpu", "fsdp"], 2) == 0
    return folders


MEASURED = ("seconds", "images_per_second", "loader_share")


def rows(folder):
    table = csv.DictReader((folder / "metrics.csv").open())
    return [{k: float(v) for k, v in row.items() if k not in MEASURED} for row in table]


def same(folder, weights):
    found = load_file(folder / "model.safetensors")
    return found.keys() == weights.keys() and all(
        torch.allclose(found[name], tensor, rtol=0, atol=1e-6) for name, tensor in weights.items()
    )


def test_a_sharded_training_comes_to_the_same(runs, monkeypatch):
    monkeypatch.setattr("localmamba.data.sources.load_digits", few_digits)
    threads = torch.get_num_threads()
    ready = Training(TrainingJob.from_config({**JOB, "parallel": "ddp"}))
    ready.run()
    torch.set_num_threads(threads)
    assert same(runs[0], ready.model.state_dict())
    for one, two in zip(ready.history.rows, rows(runs[0]), strict=True):
        assert two == pytest.approx({k: v for k, v in one.items() if k not in MEASURED}, abs=1e-6)


@pytest.mark.parametrize("count", [1, 4])
def test_a_state_loads_on_another_number_of_processes(runs, count, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    whole, stopped = runs
    folder = shutil.copytree(stopped, tmp_path / "run")
    assert run_processes([*PROGRAM, "resume", str(folder), "cpu", "fsdp"], count) == 0
    assert same(folder, load_file(whole / "model.safetensors"))
    for one, two in zip(rows(whole), rows(folder), strict=True):
        assert two == pytest.approx(one, abs=1e-6)
    assert not list(folder.glob("state*"))


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", ".metadata", "meta.pt"])
def test_the_state_before_serves_where_a_shard_is_damaged(runs, name, tmp_path):
    folder = shutil.copytree(runs[1], tmp_path / "run")
    file = folder / "state.pt" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    job = TrainingJob.from_config(JOB)
    with pytest.warns(UserWarning, match=f"{name} is damaged"):
        assert find_state(folder, job) == folder / "state-before.pt"


def test_what_does_not_run_sharded():
    with pytest.raises(ValueError, match="ema runs with parallel ddp"):
        TrainingJob.from_config({**JOB, "ema": 0.9})
    with pytest.raises(ValueError, match="a search runs with parallel ddp"):
        SearchJob.from_config({"data": "digits", "model": "x", "parallel": "fsdp"})
    with pytest.raises(ValueError, match="precision 32 or bf16-mixed"):
        Hardware(parallel="fsdp", precision="16-mixed")
    with pytest.raises(ValueError, match="fsdp runs with launch eager"):
        Hardware(parallel="fsdp", launch="compile")
