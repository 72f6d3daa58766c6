"""The study on Fashion-MNIST end to end, on noise at minimum size."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from localmamba.tasks.checkpoints import load_checkpoint

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

STUDY = Path(__file__).parents[1] / "benchmarks" / "fashion_mnist"
SIZES = [
    "--depth", "1", "--width", "8", "--patch", "14", "--batch", "8", "--cost-batch", "8",
    "--images", "40", "--epochs", "1", "--search-epochs", "1", "--population", "2",
    "--generations", "1", "--device", "cpu", "--workers", "1",
    "--seeds", "2", "--arms", "rows", "both_channel", "searched",
]  # fmt: skip


def run(*words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, STUDY / "study.py", *SIZES, *words]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """File in the format of prepare.py, of noise."""
    path = tmp_path_factory.mktemp("data") / "noise.npz"
    draw = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "test"):
        arrays[f"{split}_images"] = draw.integers(0, 256, (48, 28, 28), np.uint8)
        arrays[f"{split}_labels"] = draw.integers(0, 10, 48, np.uint8)
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def study(images, tmp_path_factory) -> Path:
    """Output folder of a study of three arms, one of them searched."""
    folder = tmp_path_factory.mktemp("study")
    done = run("--data", images, "--output", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def records_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_every_run_is_recorded(study):
    records = records_of(study)
    found = sorted((record["kind"], record["what"], record["seed"]) for record in records)
    arms = ("both_channel", "rows", "searched")
    assert found == [
        *(("cost", what, 0) for what in ("both_channel", "rows", "softmax")),
        *(("search", "softmax", seed) for seed in (0, 1)),
        *(("train", arm, seed) for arm in arms for seed in (0, 1)),
    ]
    by_name = {(r["kind"], r["what"], r["seed"]): r for r in records}
    for seed in (0, 1):
        searched, search = (
            by_name[key]["directions"]
            for key in (("train", "searched", seed), ("search", "softmax", seed))
        )
        assert searched == search
    # Rows only has no SCAttn.
    rows, both = (by_name["train", arm, 0]["parameters"] for arm in ("rows", "both_channel"))
    assert rows < both


def test_the_example_is_a_checkpoint(study):
    _, card = load_checkpoint(study / "model.safetensors")
    (record,) = (
        record
        for record in records_of(study)
        if (record["kind"], record["what"], record["seed"]) == ("train", "searched", 0)
    )
    assert card.metrics["accuracy"] == record["test_accuracy"]
    assert card.arguments["directions"] == record["directions"]


def test_a_study_goes_on_where_it_was_cut_and_past_failures(study, images, tmp_path):
    lines = (study / "results.jsonl").read_text().splitlines(keepends=True)
    lacking = [("train", "rows", 0), ("search", "softmax", 1)]
    earlier = tmp_path / "earlier.jsonl"
    kept = [
        line
        for line, record in zip(lines, records_of(study), strict=True)
        if (record["kind"], record["what"], record["seed"]) not in lacking
    ]
    earlier.write_text("".join(kept) + lines[0][:40])  # a truncated line
    arrays = dict(np.load(images))
    arrays["test_labels"] = arrays["test_labels"][:-1]  # evaluation fails, a search does not
    np.savez(tmp_path / "bad.npz", **arrays)
    folder = tmp_path / "on"
    words = ("--data", tmp_path / "bad.npz", "--earlier", earlier, "--output", folder)
    done = run(*words)
    assert done.returncode == 1
    assert "FAILED train rows 0" in done.stdout
    records = records_of(folder)
    assert len(records) == len(kept) + 1
    last = records[-1]
    assert (last["kind"], last["what"], last["seed"]) == ("search", "softmax", 1)


def test_report(study, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(STUDY)
    runpy.run_path(str(STUDY / "report.py"))["main"](study / "results.jsonl", tmp_path)
    page = (tmp_path / "fashion_mnist.md").read_text()
    assert "Of 2 comparisons with rows only" in page
    for record in records_of(study):
        if record["kind"] == "cost":
            assert f"| {record['milliseconds']:.1f} |" in page
    for figure in ("accuracy", "directions", "probabilities"):
        assert f"fashion_mnist_{figure}.png" in page
        assert (tmp_path / f"fashion_mnist_{figure}.png").stat().st_size > 0
