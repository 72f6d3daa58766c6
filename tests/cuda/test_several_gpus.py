"""Two GPUs come to what one does, with and without sharding; a sharded state loads on one."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from localmamba.tasks.processes import run_processes

PROGRAM = Path(__file__).parents[1] / "tasks" / "sharded.py"

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Returns the final weights by number of GPUs and kind, and the folder of a stopped run."""
    pytest.importorskip("sklearn")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast is not allowed everywhere
    root = tmp_path_factory.mktemp("runs")
    found = {}
    for parallel, count in (("ddp", 1), ("ddp", 2), ("fsdp", 2)):
        folders = [root / f"{kind}_{parallel}_{count}" for kind in ("whole", "stopped")]
        for folder in folders:
            folder.mkdir()
        words = [sys.executable, str(PROGRAM), "start", *map(str, folders), "cuda", parallel]
        assert run_processes(words, count) == 0
        found[parallel, count] = load_file(folders[0] / "model.safetensors")
    return found, folders[1]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_gpus_come_to_what_one_does(weights, parallel):
    one, two = weights[0]["ddp", 1], weights[0][parallel, 2]
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-4, msg=name)


def test_a_state_of_two_gpus_loads_on_one(weights, tmp_path):
    found, stopped = weights
    folder = shutil.copytree(stopped, tmp_path / "run")
    words = [sys.executable, str(PROGRAM), "resume", str(folder), "cuda", "fsdp"]
    assert run_processes(words, 1) == 0
    resumed = load_file(folder / "model.safetensors")
    for name, tensor in found["fsdp", 2].items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=1e-4, msg=name)
