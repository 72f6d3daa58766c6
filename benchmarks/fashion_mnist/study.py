"""The paper's ablation (table 5) and its search, on Fashion-MNIST at its token grid of 14 x 14.

    python benchmarks/fashion_mnist/prepare.py                      # once, where there is network
    PYTHONPATH=. python benchmarks/fashion_mnist/study.py --output runs/study
    PYTHONPATH=. python benchmarks/fashion_mnist/report.py runs/study/results.jsonl

Every arm is trained with every seed, several runs at a time on each GPU, since a run of this size
does not fill one. Each result is a line of OUTPUT/results.jsonl, written as soon as it is there;
what stands there, or in --earlier, is not run again, so that a study may be cut into pieces of
--budget-minutes. A run that fails is reported and the others go on.
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
"""The arms whose cost is measured; that of every search is."""
EXAMPLE = ("searched", 0)
"""The arm and seed whose model is kept as an example."""
CHECKPOINT = "model.safetensors"


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


def searches_of(arms: Iterable[str]) -> list[str]:
    """The strategies that these arms need."""
    return list(dict.fromkeys(search for arm in arms if (search := ARM[arm].search)))


def cost_tasks(arms: list[str]) -> Iterator[Task]:
    """What is measured alone."""
    for what in (*(arm for arm in COSTS if arm in arms), *searches_of(arms)):
        yield Task("cost", what)


def seed_tasks(arms: list[str], seeds: int) -> Iterator[Task]:
    """Seed by seed, so that what is there after any time compares all arms."""
    for seed in range(seeds):
        yield from (Task("search", name, seed) for name in searches_of(arms))
        yield from (Task("train", arm, seed) for arm in arms)


def run_task(
    data: trials.Data, task: Task, setup: Setup, found: list | None, save: Path | None
) -> dict:
    """Runs a task; the record that results.jsonl holds."""
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
    """The device's name, and the versions."""
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else device.type,
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "timm": timm.__version__,
    }


def serve(pipe: Connection, device: str, path: Path, images: int) -> None:
    """What a worker process does: runs what comes through the pipe, until the pipe is closed.

    A run that fails ends the process, since errors of a GPU outlast the run that met them.
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
    """A process that has a device and runs one task at a time.

    Args:
        device: `cuda:0` and so on, or `cpu`.
        data: What prepare.py wrote.
        images: Training images that are used.
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
        """Begins a task."""
        self.task, self.started = task, time.monotonic()
        with suppress(BrokenPipeError):  # the process died: `finish` says so
            self.pipe.send((task, *order))

    def finish(self) -> tuple[Task, float, dict | str]:
        """The task that is done, its seconds, and its record or the text of its error."""
        task, self.task = self.task, None
        assert task is not None
        try:
            answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            answer = f"the process ended with code {self.process.exitcode}"
        return task, time.monotonic() - self.started, answer

    def stop(self) -> None:
        """Ends the process, whatever it does."""
        self.process.terminate()
        self.process.join()


class Results:
    """The records, in a file of one line each.

    Args:
        path: The file; it is added to.
        earlier: Another such file, whose records count too and are copied, its example as well.
        setup: Of all records.

    Raises:
        ValueError: If a record is of another setup.
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
        """Keeps a record, on the disk too."""
        self.done[task] = record
        with self.path.open("a") as file:
            file.write(as_line(record))


class Study:
    """Runs tasks, some at a time, for a limited time.

    Args:
        results: What is there.
        setup: Sizes.
        data: What prepare.py wrote.
        deadline: When all ends, by `time.monotonic`; a run that would not be done is not begun.

    Attributes:
        failed: Tasks that raised an error.
    """

    def __init__(self, results: Results, setup: Setup, data: Path, deadline: float):
        self.results, self.setup, self.data, self.deadline = results, setup, data, deadline
        self.crew: list[Worker] = []
        self.failed: list[Task] = []
        self.took: dict[tuple[str, str], float] = {}

    def run(self, tasks: Iterable[Task], devices: list[str]) -> int:
        """Runs what is not done yet, a task at a time on each of the devices.

        The processes stay for a next call, whose devices begin with these.

        Returns:
            How many are not done: for lack of time, or because they or what they need failed.
        """
        tasks = list(tasks)
        waiting = [task for task in tasks if task not in self.results.done]
        for device in devices[len(self.crew) : len(waiting)]:
            self.crew.append(self._worker(device))
        while self._work(self.crew[: len(devices)], waiting):
            pass
        return sum(task not in self.results.done for task in tasks)

    def stop(self) -> None:
        """Ends the processes."""
        for worker in self.crew:
            worker.stop()

    def _worker(self, device: str) -> Worker:
        return Worker(device, self.data, self.setup.images)

    def _work(self, crew: list[Worker], waiting: list[Task]) -> bool:
        """Gives idle workers tasks, and takes what the first to be done have done."""
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
        """The first task that has what it needs and will be done in time."""
        for task in waiting:
            ready = task.needs is None or task.needs in self.results.done
            took = self.took.get((task.kind, task.what), 0.0)
            if ready and time.monotonic() + 1.2 * took < self.deadline:
                return task
        return None

    def _order(self, task: Task) -> tuple[list | None, Path | None]:
        """The directions that the task needs, and where to save its model."""
        found = self.results.done[task.needs]["directions"] if task.needs else None
        keep = task.kind == "train" and (task.what, task.seed) == EXAMPLE
        return found, self.results.path.with_name(CHECKPOINT) if keep else None

    def _finish(self, task: Task, seconds: float, answer: dict | str) -> bool:
        """Keeps the record; False if there is none."""
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
    """The command line; every size of `Setup` is an option."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/fashion_mnist_study"))
    parser.add_argument("--earlier", type=Path, help="results.jsonl of an earlier part")
    parser.add_argument("--data", type=Path, default=Path("runs/fashion_mnist.npz"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gpus", type=int, default=max(torch.cuda.device_count(), 1))
    parser.add_argument("--workers", type=int, default=4, help="runs at a time on each GPU, or CPU")
    parser.add_argument("--arms", nargs="+", default=list(ARM), choices=list(ARM))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budget-minutes", type=float, default=9.0)
    parser.add_argument("--no-costs", action="store_true", help="skip the measurements of cost")
    for size in fields(Setup):
        option = f"--{size.name.replace('_', '-')}"
        parser.add_argument(option, type=type(size.default), default=size.default)
    arguments = parser.parse_args()
    if not arguments.data.is_file():
        parser.error(f"no images in {arguments.data}: prepare.py writes them there")
    if arguments.earlier is not None and not arguments.earlier.is_file():
        parser.error(f"no file {arguments.earlier} to go on from")
    return arguments


def main() -> None:
    """Costs first, one at a time; then the searches and trainings."""
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
        # Alone on the machine; the processes after it find its kernels compiled.
        left += study.run(cost_tasks(arguments.arms), devices[:1])
    left += study.run(seed_tasks(arguments.arms, arguments.seeds), devices)
    study.stop()
    if left:
        print(f"{left} runs are not done, {len(study.failed)} failed: go on with --earlier")
    print(results.path)
    raise SystemExit(1 if study.failed else 0)


if __name__ == "__main__":
    main()
