"""The paper's ablation (table 5) and its search, on Fashion-MNIST and on photographs.

    python benchmarks/fashion_mnist/prepare.py                         # once, with network access
    PYTHONPATH=. python benchmarks/fashion_mnist/study.py --output runs/study.jsonl
    PYTHONPATH=. python benchmarks/fashion_mnist/report.py runs/study.jsonl

Trains every arm with every seed. Each GPU has a few processes, each of which trains a few models at
the same time. Every finished trial is a line of the output, which the next run does not repeat; no
trial is started that would not finish within --minutes. Exit code 1 if a trial failed.
"""

import argparse
import multiprocessing
import time
import traceback
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import torch
import trials
from arms import ARMS, SETUPS, Setup, Trial, add_record, as_line, list_trials, read_records

from localmamba._files import write_atomically
from localmamba.benchmark import describe_machine


@dataclass(frozen=True)
class Order:
    """Settings that every process shares.

    Attributes:
        trials: Trials to run, in this order.
        setups: Sizes by data set.
        folder: Folder of prepare.py's files.
        output: File of the records.
        streams: Models that a process trains at the same time.
        graph: Whether steps are CUDA graphs.
        deadline: End by `time.time`.
    """

    trials: list[Trial]
    setups: dict[str, Setup]
    folder: Path
    output: Path
    streams: int
    graph: bool
    deadline: float


class Turn:
    """A trial that is being run, on a stream of its own on a GPU."""

    def __init__(self, order: Order, trial: Trial, device: torch.device):
        self.trial = trial
        self.setup = order.setups[trial.data]
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.steps = trials.run(trial, self.setup, order.folder, device, order.graph)

    def step(self) -> dict[str, Any] | None:
        """Runs a step; returns the record after the last."""
        try:
            with torch.cuda.stream(self.stream) if self.stream else nullcontext():
                next(self.steps)
        except StopIteration as end:
            return end.value
        return None


def serve(order: Order, device_name: str, taken: "Synchronized[int]") -> None:
    """Runs trials until none is left or would finish in time.

    A failed trial ends the process with code 1, since CUDA errors persist in it.
    """
    torch.set_num_threads(1)
    device = torch.device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    machine = {**describe_machine(device.type), "launch": "graph" if order.graph else "eager"}
    turns: list[Turn] = []
    while True:
        while len(turns) < order.streams and (trial := next_trial(order, taken)):
            turns.append(Turn(order, trial, device))
        if not turns:
            return
        for turn in list(turns):
            try:
                record = turn.step()
            except Exception:
                print(f"FAILED {turn.trial}\n{traceback.format_exc()}", flush=True)
                raise SystemExit(1) from None
            if record is not None:
                turns.remove(turn)
                notes = {"setup": asdict(turn.setup), "machine": machine}
                add_record(order.output, turn.trial, record | notes)
                accuracy, seconds = record["accuracy"], record["seconds"]
                left = order.deadline - time.time()
                print(
                    f"{turn.trial}: {accuracy:.4f}, {seconds:.0f} s, {left:.0f} s left", flush=True
                )


def next_trial(order: Order, taken: "Synchronized[int]") -> Trial | None:
    """Takes the next trial that will finish in time, by what its like took so far."""
    took: dict[tuple[str, str], float] = {}
    for trial, record in read_records(order.output).items():
        key = trial.data, trial.arm
        took[key] = max(took.get(key, 0.0), record["seconds"])
    while True:
        with taken.get_lock():
            position = taken.value
            taken.value += 1
        if position >= len(order.trials):
            return None
        trial = order.trials[position]
        if time.time() + took.get((trial.data, trial.arm), 0.0) < order.deadline:
            return trial


def parse_arguments() -> argparse.Namespace:
    """Parses the command line; a field of `Setup` overrides that of every data set."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/study.jsonl"))
    parser.add_argument("--data", type=Path, default=Path("runs"), help="folder of prepare.py")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument(
        "--launch", choices=("graph", "eager"), default="graph" if cuda else "eager"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes a GPU, or on the CPU")
    parser.add_argument(
        "--streams", type=int, default=3, help="models that a process trains at once"
    )
    for field in fields(Setup):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=field.type)
    return parser.parse_args()


def main() -> int:
    """Runs what is missing; returns the exit code."""
    arguments = parse_arguments()
    deadline = time.time() + 60 * arguments.minutes
    given = {f.name: value for f in fields(Setup) if (value := getattr(arguments, f.name))}
    setups = {name: replace(setup, **given) for name, setup in SETUPS.items()}
    for name in setups:
        if not (arguments.data / f"{name}.npz").is_file():
            raise SystemExit(f"no {name}.npz in {arguments.data}: prepare.py writes it")
    done = read_records(arguments.output)
    for trial, record in done.items():
        if record["setup"] != asdict(setups[trial.data]):
            raise SystemExit(f"{arguments.output} holds trials of other sizes: name another output")
    # Whole lines only: what follows a line that was cut off would be lost with it.
    lines = [as_line(trial, record) for trial, record in done.items()]
    write_atomically(arguments.output, "".join(lines))
    wanted = list_trials(arguments.arms, arguments.seeds)
    order = Order(
        [trial for trial in wanted if trial not in done], setups, arguments.data, arguments.output,
        arguments.streams, arguments.launch == "graph", deadline,
    )  # fmt: skip
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    devices = (gpus or ["cpu"]) * arguments.workers
    context = multiprocessing.get_context("spawn")
    taken = context.Value("i", 0)
    crew = [context.Process(target=serve, args=(order, device, taken)) for device in devices]
    for process in crew:
        process.start()
    for process in crew:
        process.join()
    left = len([trial for trial in wanted if trial not in read_records(arguments.output)])
    failed = sum(process.exitcode != 0 for process in crew)
    print(f"{arguments.output}: {len(wanted) - left} of {len(wanted)} trials, {failed} failures")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
