"""The paper's ablation (table 5) and its search, on Fashion-MNIST at its token grid of 14 x 14.

    python benchmarks/fashion_mnist/prepare.py                      # once, with network access
    PYTHONPATH=. python benchmarks/fashion_mnist/study.py --output runs/study
    PYTHONPATH=. python benchmarks/fashion_mnist/report.py runs/study/results.jsonl

Trains every arm with every seed, several runs in parallel on each GPU, since one run of this size
does not fill it. Appends each result to OUTPUT/results.jsonl and skips runs that are there or in
--earlier, so that a study can be split into parts of --budget-minutes. Reports failed runs and
continues with the others.
"""

import argparse
import multiprocessing
import platform
import shutil
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from multiprocessing.connection import Connection, wait
from pathlib import Path

import timm
import torch
import trials
from arms import ARMS, Setup
from records import as_line, read_records

ARM = {arm.name: arm for arm in ARMS}
COSTS = ("rows", "both", "both_channel", "both_spatial", "all")
"""Arms whose cost is measured, besides every search."""
EXAMPLE = ("searched", 0)
"""Arm and seed whose model is saved as an example."""
CHECKPOINT = "model.safetensors"


@dataclass(frozen=True)
class Task:
    """One run.

    Attributes:
        kind: `search`, `train` or `cost`.
        what: Name of a strategy or an arm.
        seed: Seed of the run.
    """

    kind: str
    what: str
    seed: int = 0

    @property
    def needs(self) -> "Task | None":
        """Task of the search that gives the directions of an arm, if any."""
        if self.kind == "train" and ARM[self.what].search is not None:
            return Task("search", ARM[self.what].search, self.seed)
        return None


def searches_of(arms: Iterable[str]) -> list[str]:
    """Returns the strategies that these arms need."""
    return list(dict.fromkeys(search for arm in arms if (search := ARM[arm].search)))


def cost_tasks(arms: list[str]) -> Iterator[Task]:
    """Yields the measurements of cost, which run alone."""
    for what in (*(arm for arm in COSTS if arm in arms), *searches_of(arms)):
        yield Task("cost", what)


def seed_tasks(arms: list[str], seeds: int) -> Iterator[Task]:
    """Yields searches and trainings seed by seed, so that partial results compare all arms."""
    for seed in range(seeds):
        yield from (Task("search", name, seed) for name in searches_of(arms))
        yield from (Task("train", arm, seed) for arm in arms)


def run_task(
    data: trials.Data, task: Task, setup: Setup, found: list | None, save: Path | None
) -> dict:
    """Runs a task and returns its record for results.jsonl."""
    if task.kind == "search":
        record = trials.search(data, setup, task.what, task.seed)
    elif task.kind == "cost":
        record = trials.cost(data, setup, ARM.get(task.what, task.what))
    else:
        arm = ARM[task.what]
        table = arm.table(setup, task.seed, found)
        record = trials.train(data, setup, arm, table, task.seed, save)
    return {**asdict(task), **record, "setup": asdict(setup), "machine": machine(data.device)}


def machine(device: torch.device) -> dict[str, str]:
    """Returns the name of the device and the versions."""
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else device.type,
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "timm": timm.__version__,
    }


def serve(pipe: Connection, device: str, path: Path, images: int) -> None:
    """Runs tasks from the pipe in a worker process, until the pipe is closed.

    A failed run ends the process, since CUDA errors persist in it.
    """
    torch.set_num_threads(1)
    if device != "cpu":
        torch.cuda.set_device(device)
    data = trials.Data(path, torch.device(device), images)
    while True:
        try:
            order = pipe.recv()
        except EOFError:
            return
        try:
            answer: dict | str = run_task(data, *order)
        except Exception:
            answer = traceback.format_exc()
        pipe.send(answer)
        if isinstance(answer, str):
            return


class Worker:
    """A process that runs one task at a time on a device.

    Args:
        device: `cuda:0` and so on, or `cpu`.
        data: File of prepare.py.
        images: Number of training images used.
    """

    def __init__(self, device: str, data: Path, images: int):
        self.device = device
        self.task: Task | None = None
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        arguments = (theirs, device, data, images)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def start(self, task: Task, *order: object) -> None:
        """Sends a task to the process."""
        self.task, self.started = task, time.monotonic()
        with suppress(BrokenPipeError):  # the process died: `finish` reports it
            self.pipe.send((task, *order))

    def finish(self) -> tuple[Task, float, dict | str]:
        """Receives the result: the task, its seconds, and its record or error message."""
        task, self.task = self.task, None
        assert task is not None
        try:
            answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            answer = f"the process ended with code {self.process.exitcode}"
        return task, time.monotonic() - self.started, answer

    def stop(self) -> None:
        """Terminates the process."""
        self.process.terminate()
        self.process.join()


class Results:
    """Records of the finished tasks, kept in a file.

    Args:
        path: Results file, appended to.
        earlier: Results file of an earlier part, whose records and example are copied.
        setup: Sizes of the study.

    Raises:
        ValueError: If a record has another setup.
    """

    def __init__(self, path: Path, earlier: Path | None, setup: Setup):
        self.path = path
        self.done: dict[Task, dict] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        for file in filter(None, (earlier, path)):
            for record in read_records(file):
                if record["setup"] != asdict(setup):
                    raise ValueError(f"{file} holds runs of other sizes; name another --output")
                self.done[Task(record["kind"], record["what"], record["seed"])] = record
        draft = path.with_suffix(".draft")
        draft.write_text("".join(map(as_line, self.done.values())))
        draft.replace(path)
        if earlier is not None and earlier.with_name(CHECKPOINT).is_file():
            example = path.with_name(CHECKPOINT)
            if not example.exists():
                shutil.copy(earlier.with_name(CHECKPOINT), example)

    def add(self, task: Task, record: dict) -> None:
        """Adds a record and appends it to the file."""
        self.done[task] = record
        with self.path.open("a") as file:
            file.write(as_line(record))


class Study:
    """Runs tasks in parallel until a deadline.

    Args:
        results: Records of finished tasks.
        setup: Sizes of the study.
        data: File of prepare.py.
        deadline: End by `time.monotonic`; no task starts that would not finish before it.

    Attributes:
        failed: Tasks that raised an error.
    """

    def __init__(self, results: Results, setup: Setup, data: Path, deadline: float):
        self.results, self.setup, self.data, self.deadline = results, setup, data, deadline
        self.crew: list[Worker] = []
        self.failed: list[Task] = []
        self.took: dict[tuple[str, str], float] = {}

    def run(self, tasks: Iterable[Task], devices: list[str]) -> int:
        """Runs the unfinished tasks, one at a time per device.

        Processes are kept for the next call, whose devices must begin with these.

        Returns:
            Number of unfinished tasks, for lack of time or because they or their search failed.
        """
        tasks = list(tasks)
        waiting = [task for task in tasks if task not in self.results.done]
        for device in devices[len(self.crew) : len(waiting)]:
            self.crew.append(self._worker(device))
        while self._work(self.crew[: len(devices)], waiting):
            pass
        return sum(task not in self.results.done for task in tasks)

    def stop(self) -> None:
        """Terminates the processes."""
        for worker in self.crew:
            worker.stop()

    def _worker(self, device: str) -> Worker:
        return Worker(device, self.data, self.setup.images)

    def _work(self, crew: list[Worker], waiting: list[Task]) -> bool:
        """Sends tasks to idle workers, then waits for a worker to finish."""
        for worker in crew:
            if worker.task is None and (task := self._next(waiting)):
                waiting.remove(task)
                worker.start(task, self.setup, *self._order(task))
        busy = {worker.pipe: worker for worker in crew if worker.task}
        ready = wait(list(busy), max(self.deadline - time.monotonic(), 0)) if busy else []
        for worker in (busy[pipe] for pipe in ready):
            if not self._finish(*worker.finish()):
                worker.stop()
                self.crew[self.crew.index(worker)] = self._worker(worker.device)
        return bool(ready)

    def _next(self, waiting: list[Task]) -> Task | None:
        """Returns the first task whose search is done and that will finish in time."""
        for task in waiting:
            ready = task.needs is None or task.needs in self.results.done
            took = self.took.get((task.kind, task.what), 0.0)
            if ready and time.monotonic() + 1.2 * took < self.deadline:
                return task
        return None

    def _order(self, task: Task) -> tuple[list | None, Path | None]:
        """Returns the directions of the task's search, and where to save its model."""
        found = self.results.done[task.needs]["directions"] if task.needs else None
        keep = task.kind == "train" and (task.what, task.seed) == EXAMPLE
        return found, self.results.path.with_name(CHECKPOINT) if keep else None

    def _finish(self, task: Task, seconds: float, answer: dict | str) -> bool:
        """Keeps the record; returns False if the task failed."""
        name = f"{task.kind} {task.what} {task.seed}"
        left = self.deadline - time.monotonic()
        if isinstance(answer, str):
            self.failed.append(task)
            print(f"FAILED {name}: {seconds:.0f} s, {left:.0f} s left\n{answer}", flush=True)
            return False
        key = task.kind, task.what
        self.took[key] = max(self.took.get(key, 0.0), seconds)
        self.results.add(task, answer)
        shown = ("test_accuracy", "entropy", "milliseconds", "memory_bytes")
        figures = {key: round(answer[key], 4) for key in shown if key in answer}
        print(f"{name}: {seconds:.0f} s {figures}, {left:.0f} s left", flush=True)
        return True


def parse_arguments() -> argparse.Namespace:
    """Parses the command line; every field of `Setup` is an option."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/fashion_mnist_study"))
    parser.add_argument("--earlier", type=Path, help="results.jsonl of an earlier part")
    parser.add_argument("--data", type=Path, default=Path("runs/fashion_mnist.npz"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gpus", type=int, default=max(torch.cuda.device_count(), 1))
    parser.add_argument(
        "--workers", type=int, default=4, help="parallel runs per GPU, or on the CPU"
    )
    parser.add_argument("--arms", nargs="+", default=list(ARM), choices=list(ARM))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budget-minutes", type=float, default=9.0)
    parser.add_argument("--no-costs", action="store_true", help="skip measurements of cost")
    for size in fields(Setup):
        option = f"--{size.name.replace('_', '-')}"
        parser.add_argument(option, type=type(size.default), default=size.default)
    arguments = parser.parse_args()
    if not arguments.data.is_file():
        parser.error(f"no images in {arguments.data}: prepare.py writes them there")
    if arguments.earlier is not None and not arguments.earlier.is_file():
        parser.error(f"no such file: {arguments.earlier}")
    return arguments


def main() -> None:
    """Measures costs one at a time, then runs searches and trainings in parallel."""
    arguments = parse_arguments()
    deadline = time.monotonic() + 60 * arguments.budget_minutes
    setup = Setup(**{size.name: getattr(arguments, size.name) for size in fields(Setup)})
    try:
        results = Results(arguments.output / "results.jsonl", arguments.earlier, setup)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    study = Study(results, setup, arguments.data, deadline)
    gpus = [f"cuda:{i}" for i in range(arguments.gpus)]
    devices = (["cpu"] if arguments.device == "cpu" else gpus) * arguments.workers
    left = 0
    if not arguments.no_costs:
        # Alone on the machine. Later processes find the kernels compiled.
        left += study.run(cost_tasks(arguments.arms), devices[:1])
    left += study.run(seed_tasks(arguments.arms, arguments.seeds), devices)
    study.stop()
    if left:
        print(f"{left} runs unfinished, {len(study.failed)} failed: continue with --earlier")
    print(results.path)
    raise SystemExit(1 if study.failed else 0)


if __name__ == "__main__":
    main()
