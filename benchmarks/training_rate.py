"""The training loop's rate beside the bare model's, in a run that is killed and resumed once.

    python benchmarks/training_rate.py PART [--minutes 4] [--output runs/training_rate]

Parts:

    memory    Fashion-MNIST, held in memory, in patches of 2
    jpeg      JPEG files of 224 x 224 that the script writes first: garments on smooth grounds

The model is a LocalVim of 6M parameters (width 192, 16 blocks). First the bare model is timed:
forward pass, cross entropy and backward pass on one batch, on a GPU as a CUDA graph. Then the
package's training runs (with launch graph on a GPU) for about --minutes, is killed with SIGKILL at
two fifths of them, and resumed. Writes PART.json, PART.csv (a row an epoch) and the curves.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

from localmamba.benchmark import describe_machine
from localmamba.benchmark.measure import captured, median_milliseconds
from localmamba.data import ImageSettings, load_source
from localmamba.figures.curves import draw_curves
from localmamba.figures.style import save_figure
from localmamba.models.loading import build_model
from localmamba.tasks.job import TrainingJob
from localmamba.tasks.run_folder import METRICS, STATES, open_run_folder, write_csv, write_json
from localmamba.tasks.trainer import pick_device
from localmamba.tasks.training import Training

MODEL: dict[str, Any] = {
    "model": "localvim_tiny_nosearch",
    "precision": "bf16-mixed",
    "lr": 1e-3,
    "clip_grad": 1.0,
    "hflip": 0.5,
    "crop_pct": 1.0,
}
PARTS: dict[str, dict[str, Any]] = {
    "memory": {
        "data": "fashion-mnist",
        "image_size": 28,
        "batch_size": 512,
        "shift": 0.08,
        "model_args": {"depth": 16, "patch_size": 2},
    },
    "jpeg": {
        "image_size": 224,
        "batch_size": 128,
        "crop_scale": (0.5, 1.0),
        "model_args": {"depth": 16},
        "workers": os.cpu_count(),
    },
}
EXPECTED = 0.8
"""Share of the bare model's rate by which the number of epochs is chosen."""
KILLED_AT = 0.4
"""Share of the minutes after which the training is killed."""
SIDE, QUALITY = 224, 90
TEST_SHARE = 0.1
"""Share of the JPEG files that are for testing."""
METER = "meter.csv"


class Meter(Callback):
    """Writes a row an epoch: training steps, their seconds, and those of waiting for batches.

    Waiting is the time from the end of a step to the start of the next, on the CPU: the GPU works
    on in it. An epoch has fewer steps than others where it was resumed.

    Args:
        path: CSV file, which may have rows of the run before it was killed.
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows = read_rows(path)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        del pl_module
        self.steps, self.waited = 0, 0.0
        synchronize(trainer)
        self.start = self.last = time.perf_counter()

    def on_train_batch_start(self, *_: Any) -> None:
        """Adds the time since the last step."""
        self.waited += time.perf_counter() - self.last

    def on_train_batch_end(self, *_: Any) -> None:
        """Counts the step."""
        self.steps += 1
        self.last = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the row; validation follows the last step of an epoch."""
        del pl_module
        if trainer.state.fn != "fit":
            return
        synchronize(trainer)
        seconds = time.perf_counter() - self.start
        epoch = {"epoch": trainer.current_epoch + 1, "steps": self.steps}
        self.rows.append(epoch | {"step_seconds": seconds, "waited_seconds": self.waited})
        write_csv(self.path, self.rows)


def synchronize(trainer: Trainer) -> None:
    """Waits for the GPU, if there is one."""
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize()


def read_rows(path: Path) -> list[dict[str, float]]:
    """Reads a CSV file of numbers; no rows if it is absent."""
    if not path.exists():
        return []
    names, *lines = (line.split(",") for line in path.read_text().splitlines())
    return [dict(zip(names, map(float, line), strict=True)) for line in lines]


def train(job: TrainingJob, folder: Path, resume: bool) -> None:
    """Trains in this process and leaves the files of a run."""
    training = Training(job)
    with open_run_folder(folder, "", overwrite=not resume, resume=resume):
        trained = training.run(folder, resume=resume, callbacks=[Meter(folder / METER)])
        assert trained is not None
        trained.save(folder)


def bare_rate(ready: Training, graph: bool) -> float:
    """Returns images/s of a training's model without a loop around it."""
    job = ready.job
    device = pick_device(job.hardware.device)
    model = build_model(job.model, ready.arguments).to(device).train()
    batch, size = job.images.batch_size, ready.spec.size
    images = torch.randn(batch, ready.spec.channels, size, size, device=device)
    labels = torch.randint(len(ready.source.classes), (batch,), device=device)

    def step() -> None:
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, job.hardware.precision == "bf16-mixed"):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()

    run = captured(step) if graph else step
    milliseconds = median_milliseconds(run, device.type, 3.0)
    return 1e3 * batch / milliseconds


def in_child(job: TrainingJob, folder: Path, resume: bool, kill_after: float | None) -> float:
    """Trains in a process of its own, which is killed after so many seconds once it has saved.

    Returns:
        Seconds that it ran.

    Raises:
        SystemExit: If the training fails.
    """
    start = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=train, args=(job, folder, resume))
    process.start()
    while process.is_alive():
        process.join(0.2)
        seconds = time.perf_counter() - start
        saved = (folder / STATES[0]).exists()
        if kill_after is not None and saved and seconds > kill_after:
            process.kill()
            process.join()
            return seconds
    if process.exitcode:
        raise SystemExit(f"the training ended with code {process.exitcode}")
    return time.perf_counter() - start


def write_photographs(folder: Path, count: int, data_root: str) -> None:
    """Writes JPEG files: garments of Fashion-MNIST on smooth grounds, class by class."""
    source = load_source("fashion-mnist", ImageSettings(data_root=data_root))
    for split, share in (("train", 1 - TEST_SHARE), ("test", TEST_SHARE)):
        examples = source.split(split)
        chosen = np.arange(int(share * count)) % len(examples)
        names = [source.classes[i].replace("/", " or ") for i in examples.labels[chosen]]
        for name in set(names):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
        paths = [folder / split / name / f"{i}.jpg" for i, name in enumerate(names)]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(os.cpu_count(), context) as pool:
            images = np.asarray(examples.images)[chosen]
            list(pool.map(write_photograph, paths, images, chunksize=256))


def write_photograph(path: Path, garment: np.ndarray) -> None:
    """Writes one file; the name gives the seed."""
    draw = np.random.default_rng(int(path.stem))
    coarse = Image.fromarray(draw.integers(0, 256, (7, 7, 3), np.uint8))
    ground = np.asarray(coarse.resize((SIDE, SIDE), Image.BICUBIC)) + draw.normal(
        0, 6, (SIDE, SIDE, 3)
    )
    image = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
    side = int(draw.integers(112, 200))
    mask = Image.fromarray(garment).resize((side, side), Image.BICUBIC)
    corner = tuple(int(x) for x in draw.integers(0, SIDE - side, 2))
    image.paste(tuple(int(x) for x in draw.integers(0, 256, 3)), corner, mask)
    image.save(path, quality=QUALITY)


def rates(folder: Path, job: TrainingJob) -> dict[str, float]:
    """Returns medians over whole epochs: images/s and the share of waiting for batches."""
    rows = read_rows(folder / METER)
    most = max(row["steps"] for row in rows)
    whole = [row for row in rows if row["steps"] == most]
    images = most * job.images.batch_size
    epochs = read_rows(folder / "metrics.csv")
    return {
        "loop_images_per_second": images / statistics.median(r["step_seconds"] for r in whole),
        "with_validation_images_per_second": images
        / statistics.median(row["seconds"] for row in epochs),
        "waiting_share": statistics.median(r["waited_seconds"] / r["step_seconds"] for r in whole),
    }


def main() -> None:
    """Runs one part."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--output", type=Path, default=Path("runs/training_rate"))
    parser.add_argument("--run", type=Path, help="folder of the run and of the JPEG files")
    parser.add_argument("--data-root", default="~/.cache/localmamba", help="of Fashion-MNIST")
    parser.add_argument("--files", type=int, default=20_000, help="JPEG files")
    parser.add_argument("--set", type=json.loads, default={}, help="further settings, as JSON")
    arguments = parser.parse_args()
    place = arguments.run or arguments.output
    config = {**MODEL, **PARTS[arguments.part], "data_root": arguments.data_root, **arguments.set}
    cuda = pick_device(config.get("device", "auto")).type == "cuda"
    config.setdefault("launch", "graph" if cuda else "eager")
    report: dict[str, Any] = {"part": arguments.part}
    if arguments.part == "jpeg" and "data" not in config:
        config["data"] = str(place / "photographs")
        start = time.perf_counter()
        write_photographs(Path(config["data"]), arguments.files, arguments.data_root)
        report["writing_seconds"] = time.perf_counter() - start
    ready = Training(TrainingJob.from_config({**config, "epochs": 1, "warmup_epochs": 0}))
    report["parameters"] = sum(p.numel() for p in ready.model.parameters())
    images = len(ready.source.split("train"))
    rate = report["bare_images_per_second"] = bare_rate(ready, graph=cuda)
    if cuda:
        report["bare_eager_images_per_second"] = bare_rate(ready, graph=False)
        if config["launch"] != "graph":
            rate = report["bare_eager_images_per_second"]
        torch.cuda.empty_cache()
    epochs = max(2, int(EXPECTED * rate * 60 * arguments.minutes / images))
    job = TrainingJob.from_config({**config, "epochs": epochs, "warmup_epochs": epochs / 10})
    print(f"{report}: {epochs} epochs of {images} images", flush=True)
    folder = place / arguments.part
    first = in_child(job, folder, False, KILLED_AT * 60 * arguments.minutes)
    report["killed"] = not (folder / METRICS).exists()
    report["rows_before_the_kill"] = len(read_rows(folder / "metrics.csv"))
    second = in_child(job, folder, True, None) if report["killed"] else 0.0
    metrics = json.loads((folder / METRICS).read_text())
    report |= {"epochs": epochs, "seconds": [first, second], "config": config, **metrics}
    report |= rates(folder, job)
    report["loop_share"] = report["loop_images_per_second"] / report["bare_images_per_second"]
    report["machine"] = describe_machine("cuda" if cuda else "cpu")
    rows = read_rows(folder / "metrics.csv")
    write_csv(arguments.output / f"{arguments.part}.csv", rows)
    write_json(arguments.output / f"{arguments.part}.json", report)
    title = f"{config['data']}, killed and resumed after epoch {report['rows_before_the_kill']}"
    curves = draw_curves({config["model"]: rows}, metrics["split"], title)
    save_figure(curves, arguments.output / f"{arguments.part}_curves")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
