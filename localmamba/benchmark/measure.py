"""Measures the time and peak memory of a step of a model."""

import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

from localmamba.models.loading import build_model

MODES = ("inference", "training")
"""Forward pass without gradients; forward pass, cross entropy and backward pass."""

DEVICES = ("cpu", "cuda")

LAUNCHES = ("eager", "graph")
"""Kernels launched from Python, or a step replayed as one CUDA graph."""

TOKEN = 16
"""Side in pixels of a token, for throughput across image sizes."""


@dataclass(frozen=True)
class Precision:
    """Autocast type, and whether float32 matrix products may use TF32."""

    autocast: torch.dtype | None
    tf32: bool


DTYPES = {
    "float32": Precision(None, tf32=False),
    "tf32": Precision(None, tf32=True),
    "bfloat16": Precision(torch.bfloat16, tf32=True),
    "float16": Precision(torch.float16, tf32=True),
}


def _check_known(option: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise ValueError(f"unknown {option} {name!r}; known: {', '.join(known)}")


def check_available(device: str) -> None:
    """Raises ValueError if the device is a GPU and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' is not available here; use 'cpu'")


@dataclass(frozen=True)
class Setting:
    """One measurement to make.

    Attributes:
        model: Name in timm's registry.
        mode: One of `MODES`.
        device: `cpu` or `cuda`.
        dtype: One of `DTYPES`.
        batch: Number of images per step.
        size: Side of the images in pixels.
        launch: One of `LAUNCHES`.

    Raises:
        ValueError: If an attribute is not one of those allowed.
    """

    model: str
    mode: str
    device: str
    dtype: str
    batch: int
    size: int
    launch: str = "eager"

    def __post_init__(self) -> None:
        if not timm.is_model(self.model):
            raise ValueError(f"unknown model {self.model!r}; timm.list_models() names all")
        _check_known("mode", self.mode, MODES)
        _check_known("dtype", self.dtype, DTYPES)
        _check_known("device", self.device, DEVICES)
        _check_known("launch", self.launch, LAUNCHES)
        if self.launch == "graph" and self.device != "cuda":
            raise ValueError("launch 'graph' needs device 'cuda'; use 'eager'")
        if self.batch < 1 or self.size < 1:
            raise ValueError(f"batch and size must be at least 1, got {self.batch} and {self.size}")


@dataclass(frozen=True)
class Result:
    """Time and memory, or the error, of one measurement.

    Attributes:
        setting: The measurement.
        milliseconds: Median time of a step.
        memory_mib: Peak memory of tensors, including weights and images.
        error: Reason for a failure; empty on success.
    """

    setting: Setting
    milliseconds: float = float("nan")
    memory_mib: float = float("nan")
    error: str = ""

    @property
    def images_per_second(self) -> float:
        """Throughput in images per second."""
        return 1e3 * self.setting.batch / self.milliseconds

    @property
    def tokens_per_second(self) -> float:
        """Throughput in tokens of 16 x 16 pixels, constant over sizes if cost is linear."""
        return self.images_per_second * (self.setting.size / TOKEN) ** 2


WARM_UP_STEPS = {"cpu": 2, "cuda": 10}
MIN_STEPS, MAX_STEPS = 5, 200
MIB = 2**20


class Workload:
    """A model and a batch on the device, and the step to time."""

    def __init__(self, setting: Setting) -> None:
        torch.manual_seed(0)
        self.setting = setting
        with torch.device(setting.device):
            self.model = build_model(setting.model, {"img_size": setting.size})
        self.model.train(setting.mode == "training")
        shape = (setting.batch, 3, setting.size, setting.size)
        self.images = torch.randn(shape, device=setting.device)
        self.labels = torch.randint(1000, (setting.batch,), device=setting.device)
        dtype = DTYPES[setting.dtype].autocast
        self.autocast = torch.autocast(setting.device, dtype=dtype, enabled=dtype is not None)

    def step(self) -> None:
        """Runs a forward pass and, in training, a backward pass."""
        if self.setting.mode == "inference":
            with torch.inference_mode(), self.autocast:
                self.model(self.images)
            return
        self.model.zero_grad(set_to_none=True)
        with self.autocast:
            loss = F.cross_entropy(self.model(self.images), self.labels)
        loss.backward()

    def held_bytes(self) -> int:
        """Memory of weights, buffers and inputs."""
        held = [*self.model.parameters(), *self.model.buffers(), self.images, self.labels]
        return sum(x.numel() * x.element_size() for x in held)


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _times_on_cpu(step: Callable[[], None], steps: int) -> list[float]:
    marks = [time.perf_counter()]
    for _ in range(steps):
        step()
        marks.append(time.perf_counter())
    return [1e3 * (end - start) for start, end in pairwise(marks)]


def _times_on_cuda(step: Callable[[], None], steps: int) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairwise(marks)]


def median_milliseconds(step: Callable[[], None], device: str, seconds: float) -> float:
    """Returns the median time of a step after warm-up, by CUDA events on a GPU.

    Args:
        step: Function to time.
        device: `cpu` or `cuda`.
        seconds: Duration of the measurement, between 5 and 200 steps.
    """
    measure_times = _times_on_cuda if device == "cuda" else _times_on_cpu
    for _ in range(WARM_UP_STEPS[device]):
        step()
    steps = round(1e3 * seconds / max(measure_times(step, 1)[0], 1e-3))
    return statistics.median(measure_times(step, min(max(steps, MIN_STEPS), MAX_STEPS)))


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Silences PyTorch's profiler, which writes to file descriptor 2 at any logging level."""
    stderr = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _peak_on_cuda(work: Workload, before: int) -> float:
    """Returns the peak of allocated memory, less that before the model, in MiB."""
    work.step()
    torch.cuda.reset_peak_memory_stats()
    work.step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def _peak_on_cpu(work: Workload) -> float:
    """Returns the peak of held memory plus allocations seen by PyTorch's profiler, in MiB."""
    work.model.zero_grad(set_to_none=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        _silent_stderr(),
        torch.profiler.profile(activities=activities, profile_memory=True) as profile,
    ):
        work.step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    now = peak = work.held_bytes()
    for _, change in memory:
        now += change
        peak = max(peak, now)
    return peak / MIB


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """Captures the step as a CUDA graph, without launch overhead from Python.

    Returns:
        Its replay, which keeps `step` alive, and so the tensors that the graph reads.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_STEPS["cuda"]):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(_reads: Callable[[], None] = step) -> None:
        graph.replay()

    return replay


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate" in str(error):
        return "out of memory"
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def _measure(setting: Setting, seconds: float) -> Result:
    device = setting.device
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    work = Workload(setting)
    memory = _peak_on_cuda(work, before) if device == "cuda" else _peak_on_cpu(work)
    step = captured(work.step) if work.setting.launch == "graph" else work.step
    milliseconds = median_milliseconds(step, device, seconds)
    return Result(work.setting, milliseconds, memory)


def measure(setting: Setting, seconds: float = 3.0) -> Result:
    """Measures one model; a failure is returned in the result.

    Args:
        setting: Measurement to make.
        seconds: Duration of the timing.
    """
    try:
        with _tf32(DTYPES[setting.dtype].tf32):
            return _measure(setting, seconds)
    except Exception as error:  # a failing model must not end a long run
        return Result(setting, error=_reason(error))
    finally:
        gc.collect()
        if setting.device == "cuda":
            torch.cuda.empty_cache()
