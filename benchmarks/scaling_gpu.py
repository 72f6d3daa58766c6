"""Training steps on one GPU and on several of one host, and what more GPUs would cost.

    python benchmarks/scaling_gpu.py [FOLDER] [--devices 2]
    python benchmarks/scaling_gpu.py FOLDER --project

LocalVim-T in bfloat16 autocast, 128 images of 224 x 224 on each GPU, with AdamW. scaling.csv has:

    ddp           forward, backward with the all-reduce of DistributedDataParallel, optimizer step
    no_sync       the same without the all-reduce
    graph         forward and backward as one CUDA graph, then one all-reduce, then the optimizer
    graph_16 ...  the same with fewer images on each GPU
    fsdp          parameters sharded by FSDP2
    all_reduce    all-reduce of the gradients alone, in buckets of 25 MB; `latency` of 4 bytes
    loop          the package's training from images in memory, `loop_graph` with --launch graph

--project computes the cost on more GPUs from that file. Small, to try the script on a CPU:

    python benchmarks/scaling_gpu.py /tmp/x --device cpu --model localvim_demo --size 8 --batch 8
"""

import argparse
import csv
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import localmamba  # noqa: F401  registers the models
from localmamba.benchmark import describe_machine
from localmamba.benchmark.measure import captured
from localmamba.tasks.optimization import make_optimizer
from localmamba.tasks.processes import find_launcher, report_error, run_processes
from localmamba.tasks.run_folder import write_csv
from localmamba.tasks.settings import TrainingSettings

STEPS, WARM_UP = 30, 8
BUCKET = 25 * 2**20
"""Bytes of a bucket of DistributedDataParallel."""
PROJECTED = (1, 2, 8, 64, 512)
NETWORKS = {"NVLink, as measured": None, "400 Gb/s a GPU": 50e9, "100 Gb/s a GPU": 12.5e9}
"""Bytes a second between GPUs of different hosts."""


class Measurement:
    """Times steps of this process together with the others."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.device = torch.device(options.device, self.rank if options.device == "cuda" else None)
        self.cuda = options.device == "cuda"
        self.rows: list[dict[str, Any]] = []

    def time(self, name: str, step: Callable[[], object], images: int = 0, size: int = 0) -> None:
        """Adds a row with the mean time of a step in the slowest process."""
        for _ in range(WARM_UP):
            step()
        self.wait()
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        self.wait()
        self.add(name, (time.perf_counter() - start) / STEPS, images, size)

    def add(self, name: str, seconds: float, images: int = 0, size: int = 0) -> None:
        """Adds a row."""
        slowest = torch.tensor(seconds, device=self.device, dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        seconds = float(slowest)
        memory = torch.cuda.max_memory_allocated() / 2**20 if self.cuda else 0
        self.rows.append(
            {
                "gpus": self.count, "what": name, "ms": round(1e3 * seconds, 3),
                "images_per_s": round(self.count * images / seconds, 1), "bytes": size,
                "peak_MiB": round(memory, 1),
            }
        )  # fmt: skip

    def wait(self) -> None:
        """Waits for the GPU and the other processes."""
        if self.cuda:
            torch.cuda.synchronize()
        dist.barrier()

    @contextmanager
    def model(self) -> Iterator[nn.Module]:
        """Makes the model; starts the count of memory."""
        torch.manual_seed(0)
        model = timm.create_model(self.options.model, num_classes=1000).to(self.device).train()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        yield model
        del model
        if self.cuda:
            torch.cuda.empty_cache()

    def batch(self, images: int) -> tuple[Tensor, Tensor]:
        """Makes random images and labels on the device."""
        size = self.options.size
        return (
            torch.randn(images, 3, size, size, device=self.device),
            torch.randint(1000, (images,), device=self.device),
        )

    def loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Computes the loss under autocast."""
        with torch.autocast(self.options.device, torch.bfloat16):
            logits = model(images)
        return F.cross_entropy(logits.float(), labels)


def eager_step(m: Measurement, wrapped: nn.Module, sync: bool = True) -> Callable[[], None]:
    """Returns a training step launched from Python."""
    optimizer = make_optimizer(wrapped, TrainingSettings())
    images, labels = m.batch(m.options.batch)

    def step() -> None:
        with nullcontext() if sync else wrapped.no_sync():
            m.loss(wrapped, images, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def graph_step(m: Measurement, model: nn.Module, batch: int) -> Callable[[], None]:
    """Returns a step that replays a CUDA graph and reduces all gradients at once."""
    optimizer = make_optimizer(model, TrainingSettings())
    images, labels = m.batch(batch)
    parameters = [p for p in model.parameters() if p.requires_grad]
    flat = torch.zeros(sum(p.numel() for p in parameters), device=m.device)
    for parameter, part in zip(
        parameters, flat.split([p.numel() for p in parameters]), strict=True
    ):
        parameter.grad = part.view_as(parameter)

    def backward() -> None:
        flat.zero_()
        m.loss(model, images, labels).backward()

    replay = captured(backward) if m.cuda else backward

    def step() -> None:
        replay()
        if m.count > 1:
            dist.all_reduce(flat, dist.ReduceOp.AVG if m.cuda else dist.ReduceOp.SUM)
        optimizer.step()

    return step


def measure(m: Measurement) -> None:
    """Measures everything but the loop."""
    batch = m.options.batch
    ids = [m.device.index] if m.cuda else None
    with m.model() as model:
        size = sum(4 * p.numel() for p in model.parameters())
        ddp = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        m.time("ddp", eager_step(m, ddp), batch)
        m.time("no_sync", eager_step(m, ddp, sync=False), batch)
        del ddp
    for images in (batch, *(b for b in (64, 16, 2) if b < batch)):
        with m.model() as model:
            name = "graph" if images == batch else f"graph_{images}"
            m.time(name, graph_step(m, model, images), images)
    with m.model() as model:
        from torch.distributed.device_mesh import init_device_mesh

        from localmamba.tasks.sharding import shard

        shard(model, init_device_mesh(m.options.device, (m.count,)))
        m.time("fsdp", eager_step(m, model), batch)
    buckets = [torch.ones(part // 4, device=m.device) for part in _cut(size, BUCKET)]
    m.time("all_reduce", lambda: [dist.all_reduce(bucket) for bucket in buckets], size=size)
    small = torch.ones(1, device=m.device)
    m.time("latency", lambda: dist.all_reduce(small), size=4)


def _cut(total: int, part: int) -> list[int]:
    return [min(part, total - start) for start in range(0, total, part)]


def measure_loop(m: Measurement, launch: str) -> None:
    """Measures the package's training, from images in memory."""
    from lightning.pytorch import Callback

    from localmamba.data import Source
    from localmamba.data.examples import Examples
    from localmamba.tasks.job import TrainingJob
    from localmamba.tasks.training import Training

    batch, size, steps = m.options.batch * m.count, m.options.size, 16
    labels = np.arange(batch * steps) % 1000
    pixels = np.random.default_rng(0).integers(0, 256, (batch * steps, size, size), dtype=np.uint8)
    whole = Examples(pixels, labels)
    splits = {"train": whole, "test": whole.subset(range(m.count))}
    source = Source("random", tuple(map(str, range(1000))), 1, splits)
    spans: list[float] = []

    class Clock(Callback):
        start = 0.0

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            del trainer, pl_module
            if args[-1] in (3, steps - 1):
                m.wait()
                if args[-1] == steps - 1:
                    spans.append((time.perf_counter() - self.start) / (steps - 4))
                self.start = time.perf_counter()

    job = TrainingJob.from_config(
        {
            "data": "random", "model": m.options.model, "batch_size": batch, "epochs": 4,
            "warmup_epochs": 0, "image_size": size, "crop_pct": 1.0, "hflip": 0.5, "mixup": 0.8,
            "cutmix": 1.0, "clip_grad": 1.0, "device": m.options.device, "devices": m.count,
            "precision": "bf16-mixed", "launch": launch,
        }
    )  # fmt: skip
    if m.cuda:
        torch.cuda.reset_peak_memory_stats()
    with mock.patch("localmamba.tasks.training.load_source", return_value=source):
        Training(job).run(callbacks=[Clock()])
    m.add("loop" if launch == "eager" else f"loop_{launch}", sorted(spans)[1], m.options.batch)


def work(options: argparse.Namespace) -> None:
    """Measures in this process, one of several."""
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.backends.cuda.matmul.allow_tf32 = True
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    m = Measurement(options)
    measure(m)
    for launch in ("eager", "graph") if m.count == 1 and m.cuda else ("eager",):
        measure_loop(m, launch)
    if m.rank == 0:
        machine = describe_machine(options.device)
        content = [{**row, "batch": options.batch, **machine} for row in m.rows]
        (options.folder / f"{m.count}.json").write_text(json.dumps(content))
    dist.destroy_process_group()


def report(rows: list[dict[str, Any]]) -> None:
    """Prints every row, and by how much several GPUs are faster than one."""
    times = {(int(row["gpus"]), row["what"]): float(row["ms"]) for row in rows}
    print(f"{'what':12}{'GPUs':>5}{'ms':>10}{'images/s':>10}{'times':>7}{'peak MiB':>10}")
    for row in rows:
        gpus, what = int(row["gpus"]), row["what"]
        rate, one = float(row["images_per_s"]), times.get((1, what))
        ratio = f"{gpus * one / float(row['ms']):.2f}" if one and rate else ""
        memory = float(row["peak_MiB"])
        print(f"{what:12}{gpus:5}{float(row['ms']):10.2f}{rate:10.0f}{ratio:>7}{memory:10.0f}")
    for gpus in sorted({gpus for gpus, _ in times} - {1}):
        overlap = overlap_share(times, gpus)
        print(
            f"{gpus} GPUs: {100 * overlap:.0f} % of the all-reduce hides behind the backward pass"
        )


def overlap_share(times: dict[tuple[int, str], float], gpus: int) -> float:
    """Returns the share of the all-reduce that does not lengthen a step of DDP."""
    seen = times[gpus, "ddp"] - times[gpus, "no_sync"]
    return min(max(1 - seen / times[gpus, "all_reduce"], 0.0), 1.0)


def project(rows: list[dict[str, Any]]) -> None:
    """Prints the cost on more GPUs, as Markdown.

    A ring moves 2 (n - 1) / n of the bytes through every GPU; a message takes the measured latency
    for every doubling of n. Nothing is hidden behind the backward pass.
    """
    times = {(int(row["gpus"]), row["what"]): float(row["ms"]) / 1e3 for row in rows}
    size = max(int(row["bytes"]) for row in rows)
    count = max(gpus for gpus, _ in times)
    latency = times[count, "latency"] / math.log2(count)
    moved = 2 * (count - 1) / count * size
    measured = moved / max(times[count, "all_reduce"] - times[count, "latency"], 1e-9)
    batch = int(rows[0]["batch"])
    compute = {
        int(what.removeprefix("graph_")) if "_" in what else batch: seconds
        for (gpus, what), seconds in times.items()
        if gpus == 1 and what.startswith("graph")
    }
    print(
        f"{size / 1e6:.1f} MB of gradients, {measured / 1e9:.0f} GB/s, {1e6 * latency:.0f} us a "
        f"doubling"
    )
    print("\n| images on a GPU | GPUs | network | step, ms | all-reduce, ms | efficiency |")
    print("| --- | --- | --- | --- | --- | --- |")
    for images, seconds in sorted(compute.items(), reverse=True):
        for n in PROJECTED:
            for network, rate in NETWORKS.items() if n > 8 else [("NVLink, as measured", None)]:
                if n > 8 and rate is None:
                    continue
                reduce = 2 * (n - 1) / n * size / (rate or measured) + latency * math.log2(n)
                total = seconds + reduce
                print(
                    f"| {images} | {n} | {network} | {1e3 * total:.1f} | {1e3 * reduce:.2f} | "
                    f"{100 * seconds / total:.0f} % |"
                )


def main() -> int:
    """Runs this script in one process and in several, or computes from what they measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--model", default="localvim_tiny")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--project", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast is not allowed everywhere
    if find_launcher() is not None:
        try:
            work(options)
        except Exception:
            report_error(traceback.format_exc())
            return 1
        return 0
    path = options.folder / "scaling.csv"
    if not options.project:
        options.folder.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, Any]] = []
        for count in dict.fromkeys((1, options.devices)):
            code = run_processes([sys.executable, __file__, *sys.argv[1:]], count)
            if code:
                return code
            rows += json.loads((options.folder / f"{count}.json").read_text())
            write_csv(path, rows)
        report(rows)
    project(list(csv.DictReader(path.open())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
