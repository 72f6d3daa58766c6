"""Processes that train together: found in the environment, or started here."""

import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from localmamba.tasks.settings import Hardware

ERRORS = "LOCALMAMBA_ERRORS"
"""Names the file for the error of a process that `run_processes` started."""

GRACE = 30.0
"""Seconds that the others have to save and exit, once one process has followed a signal."""


def find_launcher() -> str | None:
    """Returns `torchrun` or `srun` if it started this process as one of several.

    `run_processes` starts processes as torchrun does. A job of SLURM with one task is no launcher.
    """
    if "LOCAL_WORLD_SIZE" in os.environ:
        return "torchrun"
    return "srun" if int(os.environ.get("SLURM_NTASKS", "1")) > 1 else None


def count_processes(hardware: Hardware) -> tuple[int, int]:
    """Returns the number of processes on each node, and of nodes: the launcher's, if there is one.

    Raises:
        ValueError: If `hardware` has another number of devices than the launcher has processes.
    """
    launcher = find_launcher()
    if launcher is None:
        return hardware.devices, 1
    if launcher == "torchrun":
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // local
    else:
        nodes = int(os.environ.get("SLURM_NNODES", "1"))
        local = int(os.environ["SLURM_NTASKS"]) // nodes
    if hardware.devices not in (1, local):
        raise ValueError(
            f"devices {hardware.devices}: {launcher} has started {local} processes on each node; "
            f"allowed: {local}, or no devices"
        )
    return local, nodes


def run_processes(command: Sequence[str], count: int) -> int:
    """Runs a command in several processes of this host, which find each other as under torchrun.

    The first process alone prints. Signals that ask to stop go to all of them. Where one fails, the
    others would wait for it forever: they are killed, and only its error is shown.

    Args:
        command: The program, which ends with `report_error` where it fails.
        count: Number of processes.

    Returns:
        The exit code of the first process that failed, 128 + the signal if one ended it; else 0.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with TemporaryDirectory() as folder:
        errors = [Path(folder, str(rank)) for rank in range(count)]
        processes = [_start(command, rank, count, port, path) for rank, path in enumerate(errors)]
        asked: list[int] = []

        def forward(number: int, _: Any) -> None:
            asked.append(number)
            for process in processes:
                process.send_signal(number)

        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        handlers = {number: signal.signal(number, forward) for number in signals}
        try:
            rank = _wait(processes, asked)
        finally:
            for process in processes:
                process.kill()
                process.wait()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if rank is None:
            return 0
        code = processes[rank].returncode
        text = errors[rank].read_text() if errors[rank].exists() else ""
        print(text or f"process {rank} ended with code {code}\n", end="", file=sys.stderr)
        return code if code > 0 else 128 - code


def report_error(text: str) -> None:
    """Prints the error with which this process ends, or leaves it to `run_processes`."""
    if ERRORS in os.environ:
        Path(os.environ[ERRORS]).write_text(text)
    else:
        print(text, end="", file=sys.stderr)


def _start(
    command: Sequence[str], rank: int, count: int, port: int, errors: Path
) -> subprocess.Popen[bytes]:
    environment = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "localmamba",
        ERRORS: errors,
    }  # fmt: skip
    libc = ctypes.CDLL(None)

    def end_with_parent() -> None:
        if sys.platform == "linux":
            libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    others = None if rank == 0 else subprocess.DEVNULL
    return subprocess.Popen(
        command,
        env=os.environ | {key: str(value) for key, value in environment.items()},
        stdout=others,
        stderr=others,
        # Ctrl-C reaches this process alone, which passes it on once.
        start_new_session=True,
        preexec_fn=end_with_parent,
    )


def _wait(processes: Sequence[subprocess.Popen[bytes]], asked: Sequence[int]) -> int | None:
    """Waits for all processes, or for the first that fails, and returns the rank of that one."""
    failed, until = None, math.inf
    while True:
        codes = [process.poll() for process in processes]
        if failed is None and any(codes):
            failed = next(rank for rank, code in enumerate(codes) if code)
            until = time.monotonic() + (GRACE if asked else 0)
        if None not in codes or time.monotonic() >= until:
            return failed
        time.sleep(0.05)
