"""`localmamba bench`: measurements, reports, failing models."""

import csv
from dataclasses import replace
from math import isnan

import pytest
import timm
import torch

from localmamba.benchmark import (
    Result,
    Setting,
    describe_machine,
    measure,
    read_csv,
    write_csv,
)
from localmamba.benchmark.measure import Workload, median_milliseconds
from localmamba.benchmark.report import relative_times
from localmamba.cli.bench import bench, plan
from localmamba.models.loading import build_model

SMALL, OTHER = "test_vit", "test_resnet"


def setting(model: str = SMALL, mode: str = "inference", dtype: str = "float32", size: int = 32):
    return Setting(model, mode, "cpu", dtype, batch=1, size=size)


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_measures_time_and_memory(mode: str, dtype: str) -> None:
    result = measure(setting(mode=mode, dtype=dtype), seconds=0)
    weights = sum(p.numel() for p in timm.create_model(SMALL).parameters()) * 4 / 2**20
    assert result.error == ""
    assert result.milliseconds > 0
    assert result.memory_mib > weights * (2 if mode == "training" else 1)
    assert result.images_per_second == pytest.approx(1e3 / result.milliseconds)
    assert result.tokens_per_second == pytest.approx(4 * result.images_per_second)


def test_measures_our_models() -> None:
    result = measure(setting("localvim_tiny"), seconds=0)
    assert result.error == ""
    assert result.milliseconds > 0


def test_training_step_makes_every_gradient() -> None:
    work = Workload(setting(mode="training"))
    work.step()
    assert all(p.grad is not None for p in work.model.parameters())


def test_inference_step_keeps_no_gradient() -> None:
    work = Workload(setting())
    work.step()
    assert not work.model.training
    assert all(p.grad is None for p in work.model.parameters())


def test_memory_is_what_the_step_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that allocates 64 MiB and then 32 MiB peaks at 96 MiB above the weights."""

    def step(_: Workload) -> None:
        big = torch.zeros(64, 2**18)
        torch.zeros(32, 2**18).add_(1)
        del big

    monkeypatch.setattr(Workload, "step", step)
    held = Workload(setting()).held_bytes() / 2**20
    assert measure(setting(), seconds=0).memory_mib - held == pytest.approx(96, abs=0.1)


def test_precision_is_restored() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    measure(setting(dtype="tf32"), seconds=0)
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


def test_median_ignores_a_slow_step(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = iter([0, 1, 10, 11, 12, 13, 113, 114])
    monkeypatch.setattr("time.perf_counter", lambda: next(marks))
    assert median_milliseconds(lambda: None, "cpu", seconds=0) == pytest.approx(1e3)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (ValueError("size 33 does not fit\nmore"), "ValueError: size 33 does not fit"),
    ],
)
def test_a_failure_is_told_in_the_result(monkeypatch, error: Exception, reason: str) -> None:
    def fail(_: Workload) -> None:
        raise error

    monkeypatch.setattr(Workload, "step", fail)
    result = measure(setting(), seconds=0)
    assert result.error == reason
    assert isnan(result.milliseconds)
    assert isnan(result.images_per_second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "localvim_huge"}, "unknown model 'localvim_huge'"),
        ({"mode": "dreaming"}, "unknown mode 'dreaming'; known: inference, training"),
        ({"dtype": "int8"}, "unknown dtype 'int8'; known: float32, tf32, bfloat16, float16"),
        ({"device": "tpu"}, "unknown device 'tpu'; known: cpu, cuda"),
        ({"launch": "late"}, "unknown launch 'late'; known: eager, graph"),
        ({"launch": "graph"}, "launch 'graph' needs device 'cuda'; use 'eager'"),
        ({"batch": 0}, "batch and size must be at least 1, got 0 and 224"),
    ],
)
def test_impossible_settings_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(setting(size=224), **change)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_gpu_is_told() -> None:
    with pytest.raises(ValueError, match="device 'cuda' is not available here"):
        plan([SMALL], "cuda", "float32", "both", batch=[1], size=[224])


def test_plan_pairs_batches_with_sizes() -> None:
    settings = plan([SMALL], "cpu", "float32", "both", batch=(8, 2), size=(32, 64))
    assert [(s.mode, s.batch, s.size) for s in settings] == [
        ("inference", 8, 32),
        ("inference", 2, 64),
        ("training", 8, 32),
        ("training", 2, 64),
    ]
    with pytest.raises(ValueError, match="one for each size: 2 for 3 sizes"):
        plan([SMALL], "cpu", "float32", "both", batch=(8, 2), size=(32, 64, 96))
    with pytest.raises(ValueError, match="name at least one model"):
        plan([], "cpu", "float32", "both", batch=(1,), size=(32,))


def test_times_are_compared_per_image_within_mode_and_size() -> None:
    results = [
        Result(Setting("deit_tiny_patch16_224", "inference", "cpu", "float32", 2, 32), 10.0),
        Result(Setting(SMALL, "inference", "cpu", "float32", 1, 32), 15.0),
        Result(Setting(SMALL, "training", "cpu", "float32", 1, 32), 15.0),
    ]
    times = relative_times(results, "deit_tiny_patch16_224")
    assert times[:2] == [1.0, 3.0]
    assert isnan(times[2])


@pytest.mark.parametrize(("name", "size"), [(SMALL, 64), (OTHER, 64), ("localvmamba_tiny", 64)])
def test_models_are_made_for_their_size(name: str, size: int) -> None:
    with torch.device("meta"):
        model = build_model(name, {"img_size": size}).eval()
        assert model(torch.empty(1, 3, size, size)).shape == (1, 1000)


def test_machine_names_what_decides_the_speed() -> None:
    machine = describe_machine("cpu")
    assert machine["torch"] == torch.__version__.partition("+")[0]
    assert machine["timm"] == timm.__version__
    assert set(machine) == {"device", "threads", "torch", "numba", "timm"}


def test_command_writes_table_csv_and_figure(capsys: pytest.CaptureFixture, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    bench([SMALL, OTHER], mode="inference", size=[32, 64], seconds=0, output=tmp_path)
    shown = capsys.readouterr().out
    assert "images/s" in shown
    assert f"timm {timm.__version__}" in " ".join(shown.split())
    with (tmp_path / "bench.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["size"]) for row in rows] == [
        (model, size) for model in (SMALL, OTHER) for size in ("32", "64")
    ]
    assert rows[0]["relative_time"] == "1"
    assert (tmp_path / "bench.png").stat().st_size > 0


def test_csv_is_read_as_it_was_written(tmp_path) -> None:
    gpu = replace(setting(size=224), device="cuda", launch="graph")
    results = [Result(setting(), 2.5, 10.0), Result(gpu, error="out of memory")]
    machine = {"device": "NVIDIA H200", "torch": "2.11.0"}
    write_csv(results, SMALL, machine, tmp_path / "bench.csv")
    read, machine_read = read_csv(tmp_path / "bench.csv")
    assert (read[0], machine_read) == (results[0], machine)
    assert (read[1].setting, read[1].error) == (gpu, "out of memory")


def test_other_tables_are_refused(tmp_path) -> None:
    (tmp_path / "other.csv").write_text("epoch,loss\n1,2.0\n")
    with pytest.raises(ValueError, match=r"other\.csv is not a table of `localmamba bench`"):
        read_csv(tmp_path / "other.csv")


def test_command_fails_when_nothing_could_be_measured(monkeypatch, tmp_path) -> None:
    failed = Result(setting(), error="out of memory")
    monkeypatch.setattr("localmamba.cli.bench.measure", lambda *_: failed)
    with pytest.raises(ValueError, match=r"every measurement failed.*out of memory"):
        bench([SMALL], output=tmp_path)


def test_threads_must_be_some(tmp_path) -> None:
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        bench([SMALL], threads=0, output=tmp_path)


def test_baseline_must_be_measured(tmp_path) -> None:
    with pytest.raises(ValueError, match="the baseline 'resnet18' must be one of the models"):
        bench([SMALL], baseline="resnet18", output=tmp_path)
