"""Kills, signals, full disks and damaged files against trainings and searches on digits.

Every run is a process of its own, forked after the imports. As root, for the disks are mounted:

    python benchmarks/faults/campaign.py --output docs/results/faults.json
"""

import argparse
import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file

from localmamba.cli import main
from localmamba.search import STRATEGIES
from localmamba.tasks import search, training  # forked processes have them  # noqa: F401
from localmamba.tasks.run_folder import STATES, versions
from localmamba.tasks.state import read_state

TINY = [
    "--data", "digits", "--model_args", "{embed_dim: 8, depth: 1, d_state: 2}", "--warmup_epochs",
    "0", "--batch_size", "128", "--save_steps", "2", "--device", "cpu", "--threads", "1",
]  # fmt: skip
TRAIN = ["train", "--model", "localvim_demo", "--epochs", "3", "--ema", "0.9", *TINY]
SEARCH = [
    "search", "--model", "localvim_demo_search", "--candidates", "h", "v", "w2", "--keep", "2",
    "--epochs", "2", "--population", "4", "--generations", "2", "--val_images", "64", *TINY,
]  # fmt: skip
COMMANDS = {"train": TRAIN} | {
    f"search {name}": [*SEARCH, "--strategy", name] for name in STRATEGIES
}
FORK = multiprocessing.get_context("fork")
KILLS_A_RUN = 5


def start(words: Sequence[str], folder: Path) -> multiprocessing.process.BaseProcess:
    """Starts a command, or goes on with it where it has been started before."""
    folder.mkdir(parents=True, exist_ok=True)

    def command() -> None:
        with (
            open(os.devnull, "w") as nothing,
            (folder.parent / f"{folder.name}.err").open("w") as err,
        ):
            os.dup2(nothing.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.exit(main([*words, "--output", str(folder), "--resume"]))

    process = FORK.Process(target=command)
    process.start()
    return process


def finish(words: Sequence[str], folder: Path) -> int | None:
    """Runs a command to its end; returns its exit code."""
    process = start(words, folder)
    process.join()
    return process.exitcode


def result(folder: Path) -> dict[str, bytes | torch.Tensor]:
    """Returns what a run has come to."""
    files = {name: folder / name for name in ("directions.json", "probabilities.csv")}
    found: dict[str, bytes | torch.Tensor] = {
        n: p.read_bytes() for n, p in files.items() if p.exists()
    }
    for name in ("model.safetensors", "supernet.safetensors"):
        if (folder / name).exists():
            found |= load_file(folder / name)
    return found


def same(one: Path, other: Path) -> bool:
    """Returns whether two runs have come to the same, bit for bit."""
    a, b = result(one), result(other)
    return a.keys() == b.keys() and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) else x == y
        for x, y in ((a[key], b[key]) for key in a)
    )


def kill(
    process: multiprocessing.process.BaseProcess,
    folder: Path,
    number: int,
    rng: random.Random,
    seconds: float,
) -> str:
    """Sends a signal within so many seconds, or while a state is written; says which."""
    writing = number == signal.SIGKILL and rng.random() < 0.4
    until = time.monotonic() + rng.uniform(0, seconds)
    while process.is_alive() and time.monotonic() < until + 30 * writing:
        if writing and any(".state.pt." in path.name for path in folder.glob(".*.draft")):
            break
        time.sleep(0.0005 if writing else 0.01)
    if not process.is_alive():
        return "ended before"
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join()
    return "in writing" if list(folder.glob(".state.pt.*.draft")) else "elsewhere"


def undisturbed(root: Path, names: Sequence[str]) -> dict[str, tuple[Path, float]]:
    """Runs every command once; returns its folder and seconds."""
    found = {}
    for name in names:
        began = time.monotonic()
        assert finish(COMMANDS[name], root / name) == 0, (root / f"{name}.err").read_text()
        found[name] = (root / name, time.monotonic() - began)
    return found


def kills(
    root: Path, whole: Path, name: str, count: int, rng: random.Random, seconds: float
) -> Counter[str]:
    """Kills runs of a command, several times each, and lets them end."""
    found: Counter[str] = Counter()
    while found["kills"] < count:
        folder = root / f"killed {name} {found['runs']}"
        for _ in range(min(KILLS_A_RUN, count - found["kills"])):
            moment = kill(start(COMMANDS[name], folder), folder, signal.SIGKILL, rng, seconds)
            if moment == "ended before":
                break
            found["kills"] += 1
            found[moment] += 1
        found["resumed to the end"] += finish(COMMANDS[name], folder) == 0
        found["bit-equal"] += same(folder, whole)
        found["runs"] += 1
    return found


def signals(
    root: Path, whole: Path, number: int, count: int, rng: random.Random, seconds: float
) -> Counter[str]:
    """Sends a signal to trainings at random moments, and lets them end."""
    found: Counter[str] = Counter()
    while found["sent"] < count:
        folder = root / f"signal {number} {found['tries']}"
        found["tries"] += 1
        process = start(TRAIN, folder)
        if kill(process, folder, number, rng, seconds) == "ended before":
            continue
        found["sent"] += 1
        found[f"exit code {process.exitcode}"] += 1
        found["resumed to the end"] += finish(TRAIN, folder) == 0
        found["bit-equal"] += same(folder, whole)
    return found


@contextmanager
def disk(folder: Path, size: int) -> Iterator[Path]:
    """Mounts a disk in memory."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def disks(root: Path, whole: Path, count: int, rng: random.Random) -> Counter[str]:
    """Runs trainings on disks that are too small, then makes room and lets them end."""
    found: Counter[str] = Counter()
    need = 2 * 4096 * (os.path.getsize(whole / "model.safetensors") * 4 // 4096 + 3)
    while found["full"] < count and found["tries"] < 3 * count:
        found["tries"] += 1
        with disk(root / f"disk {found['tries']}", rng.randrange(need // 16, need)) as folder:
            code = finish(TRAIN, folder)
            if code == 0:
                continue
            found["full"] += 1
            text = (root / f"{folder.name}.err").read_text()
            found["one line"] += (
                code == 2 and text.count("\n") == 1 and "no space left" in text.lower()
            )
            states = [folder / name for name in STATES if (folder / name).exists()]
            found["states on it"] += len(states)
            with suppress(ValueError):
                found["states whole"] += sum(read_state(path) is not None for path in states)
            subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
            found["resumed to the end"] += finish(TRAIN, folder) == 0
            found["bit-equal"] += same(folder, whole)
    return found


def damages(
    content: bytes, header: int, count: int, rng: random.Random
) -> Iterator[tuple[str, bytes]]:
    """Yields damaged copies of a file."""
    for number in range(count):
        kind = ("header flipped", "weights flipped", "cut", "extended")[number % 4]
        damaged = bytearray(content)
        if kind == "cut":
            del damaged[rng.randrange(len(damaged)) :]
        elif kind == "extended":
            damaged += rng.randbytes(rng.randint(1, 100))
        else:
            start, end = (0, header) if kind == "header flipped" else (header, len(damaged))
            damaged[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
        yield kind, bytes(damaged)


def damage(root: Path, whole: Path, count: int, rng: random.Random, seconds: float) -> Counter[str]:
    """Gives damaged checkpoints and states to `predict` and `train --resume`."""
    from contextlib import redirect_stderr, redirect_stdout
    from io import StringIO

    from PIL import Image

    found: Counter[str] = Counter()
    Image.new("L", (8, 8)).save(root / "a.png")
    content = (whole / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    path = root / "damaged.safetensors"
    for kind, damaged in damages(content, header, count * 3 // 4, rng):
        path.write_bytes(damaged)
        err = StringIO()
        with redirect_stderr(err), redirect_stdout(StringIO()):
            code = main(
                ["predict", str(root / "a.png"), "--checkpoint", str(path), "--device", "cpu"]
            )
        found[f"weights: {kind}"] += 1
        found["refused with one line, exit 2"] += code == 2 and err.getvalue().count("\n") == 1
    for number in itertools.count():
        folder = root / f"of states {number}"
        kill(start(TRAIN, folder), folder, signal.SIGTERM, rng, seconds)
        if (folder / STATES[1]).exists():
            break
    state = (folder / STATES[0]).read_bytes()
    for kind, damaged in damages(state, 2000, count - count * 3 // 4, rng):
        for name in STATES:
            (folder / name).write_bytes(damaged)
        err = StringIO()
        with redirect_stderr(err), redirect_stdout(StringIO()):
            code = main([*TRAIN, "--output", str(folder), "--resume"])
        found[f"state: {kind}"] += 1
        found["refused with one line, exit 2"] += code == 2 and err.getvalue().count("\n") == 1
    return found


def run(
    train_kills: int, search_kills: int, full: int, damaged: int, sent: int, output: Path | None
) -> dict[str, dict[str, int]]:
    """Runs the campaign; returns and writes what was counted."""
    rng = random.Random(0)
    torch.set_num_threads(1)  # threads do not survive a fork
    warnings.simplefilter("ignore")
    found: dict[str, dict[str, int]] = {}

    def note(name: str, counted: Counter[str]) -> None:
        found[name] = dict(counted)
        print(f"{name}: {found[name]}", flush=True)
        if output is not None:
            output.write_text(json.dumps({"made_with": versions(), **found}, indent=1) + "\n")

    with TemporaryDirectory() as folder:
        root = Path(folder)
        whole = undisturbed(root, [n for n in COMMANDS if search_kills or n == "train"])
        print({name: round(seconds, 1) for name, (_, seconds) in whole.items()}, flush=True)
        train, seconds = whole["train"]
        if damaged:
            note("damaged files", damage(root, train, damaged, rng, seconds))
        for name, (path, took) in whole.items():
            count = train_kills if name == "train" else search_kills
            if not count:
                continue
            note(f"SIGKILL, {name}", kills(root, path, name, count, rng, took))
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT) if sent else ():
            note(number.name, signals(root, train, number, sent, rng, seconds))
        if full:
            note("full disks", disks(root, train, full, rng))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_kills", type=int, default=30)
    parser.add_argument("--search_kills", type=int, default=30)
    parser.add_argument("--full", type=int, default=20, help="disks")
    parser.add_argument("--damaged", type=int, default=200, help="files")
    parser.add_argument("--sent", type=int, default=10, help="signals of each kind")
    parser.add_argument("--output", type=Path)
    run(**vars(parser.parse_args()))
