"""The paper's ablation (table 5) and its search, on Fashion-MNIST at its token grid of 14 x 14.

    python benchmarks/fashion_mnist/prepare.py                      # once, where there is network
    PYTHONPATH=. python benchmarks/fashion_mnist/study.py --output runs/study
    python benchmarks/fashion_mnist/report.py runs/study/results.jsonl

Every arm is trained with every seed, several runs at a time on one GPU. Each result is a line of
OUTPUT/results.jsonl, written as soon as it is there; what stands there, or in --earlier, is not run
again, so that a study may be cut into pieces of --budget-minutes.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import runs
import torch
from arms import ARMS, Setup

ARM = {arm.name: arm for arm in ARMS}
COSTS = ("rows", "both", "both_channel", "both_spatial", "all")
STRATEGIES = ("softmax", "single_path", "binary_gates", "partial_channels")
EXAMPLE = ("searched", 0)
"""The arm and seed whose model is kept as an example."""


@dataclass(frozen=True)
class Task:
    """One run.

    Attributes:
        kind: `search`, `train` or `cost`.
        what: A strategy or an arm.
        seed: Of the run.
    """

    kind: str
    what: str
    seed: int = 0

    @property
    def needs(self) -> "Task | None":
        """The search that finds the directions of an arm."""
        if self.kind == "train" and ARM[self.what].search is not None:
            return Task("search", ARM[self.what].search, self.seed)
        return None


def all_tasks(arms: Iterable[str], seeds: int) -> Iterator[Task]:
    """Seed by seed, so that what is there after any time compares all arms."""
    arms = list(arms)
    for seed in range(seeds):
        searches = {ARM[arm].search: None for arm in arms if ARM[arm].search}
        yield from (Task("search", name, seed) for name in searches)
        yield from (Task("train", arm, seed) for arm in arms)


_DATA: runs.Data | None = None


def start_worker(path: Path, device: str, limit: int) -> None:
    """Gives a worker process its copy of the images."""
    global _DATA
    torch.set_num_threads(1 if device == "cuda" else torch.get_num_threads())
    _DATA = runs.Data(path, torch.device(device), limit)


def run_task(task: Task, setup: Setup, found: list | None, save: Path | None) -> dict:
    """Runs a task in a worker; the record that results.jsonl holds."""
    assert _DATA is not None
    if task.kind == "search":
        record = runs.search(_DATA, setup, task.what, task.seed)
    elif task.kind == "cost":
        record = runs.cost(_DATA, setup, ARM.get(task.what, task.what))
    else:
        arm = ARM[task.what]
        table = arm.table(setup, task.seed, found)
        record = runs.train(_DATA, setup, arm, table, task.seed, save)
    return {**asdict(task), **record, "setup": asdict(setup), "device": device_name(_DATA.device)}


def device_name(device: torch.device) -> str:
    """The GPU's name, or cpu."""
    return torch.cuda.get_device_name() if device.type == "cuda" else device.type


class Results:
    """The records, in a file of one line each.

    Args:
        path: The file; it is added to.
        earlier: Another such file, copied to the front of a new one.
        setup: Only records of this setup count.
    """

    def __init__(self, path: Path, earlier: Path | None, setup: Setup):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if earlier is not None and not path.exists():
            path.write_text(earlier.read_text())
        self.done: dict[Task, dict] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            record = json.loads(line)
            if record["setup"] == asdict(setup):
                self.done[Task(record["kind"], record["what"], record["seed"])] = record

    def add(self, task: Task, record: dict) -> None:
        """Keeps a record, on the disk too."""
        self.done[task] = record
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


class Study:
    """Runs tasks on one device, some at a time, for a limited time.

    Args:
        results: What is there.
        setup: Sizes.
        data: What prepare.py wrote.
        device: `cuda` or `cpu`.
        deadline: When no run may start that would not be done by then, by `time.monotonic`.
    """

    def __init__(self, results: Results, setup: Setup, data: Path, device: str, deadline: float):
        self.results, self.setup, self.deadline = results, setup, deadline
        self.longest = {"search": 0.0, "train": 0.0, "cost": 0.0}
        self.pool = partial(
            ProcessPoolExecutor,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=start_worker,
            initargs=(data, device, setup.images),
        )

    def run(self, tasks: Iterable[Task], workers: int) -> bool:
        """Runs what is not done yet; False if the time did not suffice."""
        waiting = [task for task in tasks if task not in self.results.done]
        running: dict[Future, tuple[Task, float]] = {}
        with self.pool(max_workers=workers) as pool:
            while waiting or running:
                while len(running) < workers and (task := self._next(waiting)):
                    waiting.remove(task)
                    running[self._submit(pool, task)] = (task, time.monotonic())
                if not running:
                    return False
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    self._finish(future.result(), *running.pop(future))
        return True

    def _next(self, waiting: list[Task]) -> Task | None:
        """The first task that has what it needs and will be done in time."""
        for task in waiting:
            ready = task.needs is None or task.needs in self.results.done
            if ready and time.monotonic() + 1.2 * self.longest[task.kind] < self.deadline:
                return task
        return None

    def _submit(self, pool: ProcessPoolExecutor, task: Task) -> Future:
        found = self.results.done[task.needs]["directions"] if task.needs else None
        keep = task.kind == "train" and (task.what, task.seed) == EXAMPLE
        save = self.results.path.with_name("model.safetensors") if keep else None
        return pool.submit(run_task, task, self.setup, found, save)

    def _finish(self, record: dict, task: Task, start: float) -> None:
        took = time.monotonic() - start
        self.longest[task.kind] = max(self.longest[task.kind], took)
        self.results.add(task, record)
        figures = {
            key: round(record[key], 4)
            for key in ("test_accuracy", "entropy", "milliseconds")
            if key in record
        }
        left = self.deadline - time.monotonic()
        print(f"{task.kind} {task.what} {task.seed}: {took:.0f} s {figures}, {left:.0f} s left")


def parse_arguments() -> argparse.Namespace:
    """The command line; every size of `Setup` is an option."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/fashion_mnist_study"))
    parser.add_argument("--earlier", type=Path, help="results.jsonl of an earlier part")
    parser.add_argument("--data", type=Path, default=Path(".device/fashion_mnist.npz"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--arms", nargs="+", default=list(ARM), choices=list(ARM))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=6, help="runs at a time")
    parser.add_argument("--budget-minutes", type=float, default=9.0)
    parser.add_argument("--no-costs", action="store_true", help="skip the measurements of cost")
    for size in fields(Setup):
        option = f"--{size.name.replace('_', '-')}"
        parser.add_argument(option, type=type(size.default), default=size.default)
    return parser.parse_args()


def main() -> None:
    """Costs first, one at a time; then the searches and trainings."""
    arguments = parse_arguments()
    setup = Setup(**{size.name: getattr(arguments, size.name) for size in fields(Setup)})
    results = Results(arguments.output / "results.jsonl", arguments.earlier, setup)
    deadline = time.monotonic() + 60 * arguments.budget_minutes
    study = Study(results, setup, arguments.data, arguments.device, deadline)
    whole = True
    if not arguments.no_costs:
        # Alone on the device; this also compiles the kernels that the workers then find compiled.
        whole = study.run([Task("cost", what) for what in (*COSTS, *STRATEGIES)], workers=1)
    if whole:
        whole = study.run(all_tasks(arguments.arms, arguments.seeds), arguments.workers)
    print("complete" if whole else "not complete: run again with --earlier", results.path)


if __name__ == "__main__":
    main()
