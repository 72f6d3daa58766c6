"""`localmamba bench`: measures speed and memory of models on this machine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from rich.progress import Progress

from localmamba.benchmark import (
    MODES,
    Result,
    Setting,
    check_available,
    describe_machine,
    measure,
    results_tables,
    write_csv,
)
from localmamba.cli.reports import make_console


def bench(
    models: list[str],
    device: Literal["cpu", "cuda"] = "cpu",
    dtype: Literal["float32", "tf32", "bfloat16", "float16"] = "float32",
    mode: Literal["inference", "training", "both"] = "both",
    batch: int | list[int] = 1,
    size: int | list[int] = 224,
    baseline: str | None = None,
    launch: Literal["eager", "graph"] = "eager",
    threads: int | None = None,
    seconds: float = 3.0,
    output: Path = Path("runs/bench"),
) -> None:
    """Measures speed and memory of models, ours and timm's; writes a table, a CSV and a figure.

    Inference is a forward pass; training is a forward pass, cross entropy and a backward pass,
    without an optimizer step. Times are medians after warm-up, by CUDA events on a GPU. Memory is
    the peak allocated by tensors. The row of a model that fails (out of memory, for example) shows
    the error.

    Args:
        models: Names in timm's registry, such as localvim_tiny and deit_tiny_patch16_224.
        device: Device to run on.
        dtype: float32, float32 with TF32 matrix products, or autocast to a half-precision type.
        mode: Passes to time.
        batch: Number of images per step; one number, or one per size.
        size: Side of the images in pixels; for several, the figure shows throughput over size.
        baseline: Model of the relative times; by default the first.
        launch: Kernels launched from Python (eager), or each step replayed as a CUDA graph.
        threads: Number of CPU threads; by default PyTorch's.
        seconds: Duration of each timing.
        output: Folder for bench.csv, bench.png and bench.svg.

    Raises:
        ValueError: If a setting is not allowed, or every measurement failed.

    Examples:
      localmamba bench deit_tiny_patch16_224 localvim_tiny --threads 2
      localmamba bench convnext_tiny localvmamba_tiny --device cuda --dtype bfloat16 --batch 128
      localmamba bench localvmamba_tiny --size '[224,512,1024]' --batch '[16,3,1]' --mode inference
    """
    batches, sizes = ([value] if isinstance(value, int) else value for value in (batch, size))
    settings = plan(models, device, dtype, mode, batches, sizes, launch)
    baseline = baseline or models[0]
    if baseline not in models:
        raise ValueError(f"the baseline {baseline!r} must be one of the models measured")
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    console = make_console()
    machine = describe_machine(device)
    results: list[Result] = []
    with Progress(console=console, transient=True) as progress:
        for setting in progress.track(settings, description="measuring"):
            results.append(measure(setting, seconds))
            console.print(_summary(results[-1]))
            write_csv(results, baseline, machine, output / "bench.csv")
    console.print(*results_tables(results, baseline, machine))
    if all(result.error for result in results):
        raise ValueError(f"every measurement failed, the first with: {results[0].error}")
    paths = [output / "bench.csv", *_draw(results, machine, output / "bench")]
    console.print("written to", ", ".join(map(str, paths)), soft_wrap=True)


def plan(
    models: Sequence[str],
    device: str,
    dtype: str,
    mode: str,
    batch: Sequence[int],
    size: Sequence[int],
    launch: str = "eager",
) -> list[Setting]:
    """Returns every measurement of a call of `bench`, validated."""
    if not models:
        raise ValueError("name at least one model; timm.list_models() names all")
    if len(batch) not in (1, len(size)):
        raise ValueError(
            f"give one batch, or one for each size: {len(batch)} for {len(size)} sizes"
        )
    check_available(device)
    batches = list(batch) * len(size) if len(batch) == 1 else batch
    modes = MODES if mode == "both" else (mode,)
    return [
        Setting(model, timed, device, dtype, images, pixels, launch)
        for timed in modes
        for model in models
        for images, pixels in zip(batches, size, strict=True)
    ]


def _summary(result: Result) -> str:
    s = result.setting
    found = result.error or f"{result.milliseconds:.2f} ms, {result.memory_mib:,.0f} MiB"
    return f"{s.model} {s.mode} {s.dtype} {s.batch} x {s.size}: {found}"


def _draw(results: list[Result], machine: dict[str, str], stem: Path) -> list[Path]:
    from localmamba.figures.benchmarks import draw_benchmark
    from localmamba.figures.style import save_figure

    setting = results[0].setting
    caption = ", ".join([setting.dtype, *(f"{key} {value}" for key, value in machine.items())])
    return save_figure(draw_benchmark(results, caption), stem)
