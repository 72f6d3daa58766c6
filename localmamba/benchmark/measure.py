"""Times a step of a model and asks how much memory it took."""

import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import nn

from .settings import DTYPES, Result, Setting

WARM_UP_STEPS = {"cpu": 2, "cuda": 10}
MIN_STEPS, MAX_STEPS = 5, 200
MIB = 2**20


class Workload:
    """A model and images on the device, and the step that is timed."""

    def __init__(self, setting: Setting) -> None:
        torch.manual_seed(0)
        self.setting = setting
        with torch.device(setting.device):
            self.model = create_model(setting.model, setting.size)
        self.model.train(setting.mode == "training")
        shape = (setting.batch, 3, setting.size, setting.size)
        self.images = torch.randn(shape, device=setting.device)
        self.labels = torch.randint(1000, (setting.batch,), device=setting.device)
        dtype = DTYPES[setting.dtype].autocast
        self.autocast = torch.autocast(setting.device, dtype=dtype, enabled=dtype is not None)

    def step(self) -> None:
        """One forward pass, in training with its backward pass."""
        if self.setting.mode == "inference":
            with torch.inference_mode(), self.autocast:
                self.model(self.images)
            return
        self.model.zero_grad(set_to_none=True)
        with self.autocast:
            loss = F.cross_entropy(self.model(self.images), self.labels)
        loss.backward()

    def held_bytes(self) -> int:
        """Weights, buffers and inputs."""
        held = [*self.model.parameters(), *self.model.buffers(), self.images, self.labels]
        return sum(x.numel() * x.element_size() for x in held)


def create_model(name: str, size: int) -> nn.Module:
    """A model for square images of `size` pixels, where its constructor wants to know."""
    default = timm.models.get_pretrained_cfg(name)
    if default is not None and default.input_size[-1] == size:
        return timm.create_model(name)
    try:
        return timm.create_model(name, img_size=size)
    except TypeError:  # no such argument: it takes images of any size
        return timm.create_model(name)


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
    """The median time of a step after a warm-up: by CUDA events on a GPU, by the clock elsewhere.

    Args:
        step: What is timed.
        device: `cpu` or `cuda`.
        seconds: How long to go on, within 5 and 200 steps.
    """
    measure_times = _times_on_cuda if device == "cuda" else _times_on_cpu
    for _ in range(WARM_UP_STEPS[device]):
        step()
    steps = round(1e3 * seconds / max(measure_times(step, 1)[0], 1e-3))
    return statistics.median(measure_times(step, min(max(steps, MIN_STEPS), MAX_STEPS)))


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """PyTorch's profiler announces itself on the process's stderr; no logging level stops it."""
    stderr = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _peak_on_cuda(work: Workload, before: int) -> float:
    """The most that tensors took, less what stood in memory before the model."""
    work.step()
    torch.cuda.reset_peak_memory_stats()
    work.step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def _peak_on_cpu(work: Workload) -> float:
    """What is held all along and the highest sum of what PyTorch's profiler saw come and go."""
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


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph: what it costs a GPU that does not wait for Python."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_STEPS["cuda"]):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate" in str(error):
        return "out of memory"
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def _measure(setting: Setting, seconds: float) -> Result:
    device = setting.device
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    work = Workload(setting)
    memory = _peak_on_cuda(work, before) if device == "cuda" else _peak_on_cpu(work)
    step = _captured(work.step) if work.setting.launch == "graph" else work.step
    milliseconds = median_milliseconds(step, device, seconds)
    return Result(work.setting, milliseconds, memory)


def measure(setting: Setting, seconds: float = 3.0) -> Result:
    """Measures one model; what goes wrong in it stands in the result.

    Args:
        setting: What to measure.
        seconds: How long to time it.
    """
    try:
        with _tf32(DTYPES[setting.dtype].tf32):
            return _measure(setting, seconds)
    except Exception as error:  # one model that fails must not end a long run
        return Result(setting, error=_reason(error))
    finally:
        gc.collect()
        if setting.device == "cuda":
            torch.cuda.empty_cache()
