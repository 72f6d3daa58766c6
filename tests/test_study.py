"""The study on Fashion-MNIST end to end, on noise at minimum size."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

STUDY = Path(__file__).parents[1] / "benchmarks" / "fashion_mnist"
SIZES = [
    "--depth", "1", "--width", "32", "--patch", "2", "--batch", "8", "--images", "16",
    "--epochs", "1", "--search-epochs", "1", "--workers", "1", "--streams", "2",
    "--launch", "eager", "--seeds", "2", "--arms", "rows", "both_scattn", "searched",
]  # fmt: skip
TRIALS = [
    *(("elpv", arm, seed) for arm in ("both_scattn", "rows") for seed in (0, 1)),
    *(
        ("fashion-mnist", arm, seed)
        for arm in ("both_scattn", "rows", "searched")
        for seed in (0, 1)
    ),
]


def run(monkeypatch, *words: object) -> None:
    """Runs study.py here; it trains in a process of its own."""
    monkeypatch.syspath_prepend(STUDY)
    monkeypatch.setattr(sys, "argv", [str(word) for word in ("study.py", *SIZES, *words)])
    import study

    assert study.main() == 0


def key(record: dict) -> tuple:
    return record["data"], record["arm"], record["seed"]


def records_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Folder with files in the format of prepare.py, of noise."""
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (24, 8, 8), np.uint8)
    labels = draw.permutation(np.arange(24, dtype=np.uint8) % 2)
    np.savez(folder / "elpv.npz", images=images, labels=labels)
    splits = {
        f"{s}_{k}": v
        for s in ("train", "test")
        for k, v in [("images", images), ("labels", labels)]
    }
    np.savez(folder / "fashion-mnist.npz", **splits)
    return folder


@pytest.fixture(scope="module")
def results(data, tmp_path_factory) -> Path:
    """Records of three arms, one of them searched."""
    path = tmp_path_factory.mktemp("study") / "study.jsonl"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(monkeypatch, "--data", data, "--output", path)
    return path


def test_every_trial_is_recorded(results):
    records = records_of(results)
    assert sorted(map(key, records)) == TRIALS
    by_key = {key(record): record for record in records}
    searched = by_key["fashion-mnist", "searched", 0]
    assert searched["directions"] == searched["search"]["directions"]
    # Rows alone have no SCAttn.
    rows, both = (by_key["fashion-mnist", arm, 0]["parameters"] for arm in ("rows", "both_scattn"))
    assert rows < both


def test_a_study_goes_on_where_it_was_cut(results, data, tmp_path, monkeypatch):
    lines = results.read_text().splitlines(keepends=True)
    path = tmp_path / "study.jsonl"
    path.write_text("".join(lines[:-1]) + lines[-1][:40])
    run(monkeypatch, "--data", data, "--output", path)
    records = records_of(path)
    assert records[:-1] == records_of(results)[:-1]
    last, before = records[-1], records_of(results)[-1]
    # The same trial gives the same result, whichever trials take turns with it.
    for name in ("data", "arm", "seed", "accuracy", "losses", "directions"):
        assert last[name] == before[name]


def test_report(results, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(STUDY)
    report = runpy.run_path(str(STUDY / "report.py"))
    report["main"](results, tmp_path)
    page = (tmp_path / "fashion_mnist.md").read_text()
    records = {key(record): 100 * record["accuracy"] for record in records_of(results)}
    gaps = [
        records["fashion-mnist", "both_scattn", s] - records["fashion-mnist", "rows", s]
        for s in (0, 1)
    ]
    # Half an interval of two differences: 12.706 standard errors.
    half = 12.7062 * abs(gaps[0] - gaps[1]) / 2
    assert f"| windows and SCAttn help rows | {sum(gaps) / 2:+.2f} ± {half:.2f} |" in page
    assert "columns beside rows" not in page
    for figure in ("accuracy", "directions"):
        assert f"fashion_mnist_{figure}.png" in page
        assert (tmp_path / f"fashion_mnist_{figure}.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("mean", "half", "verdict"),
    [(0.5, 0.4, "stands"), (0.5, 0.6, "undecided"), (-0.5, 0.4, "the opposite")],
)
def test_verdicts(mean, half, verdict, monkeypatch):
    monkeypatch.syspath_prepend(STUDY)
    assert runpy.run_path(str(STUDY / "report.py"))["Estimate"](mean, half, 5).verdict == verdict


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("arm", ["rows", "searched"])
def test_graphs_train_as_eager_steps_do(arm, data, monkeypatch):
    monkeypatch.syspath_prepend(STUDY)
    import arms
    import trials

    setup = arms.Setup(patch=2, epochs=4, batch=8, depth=2, search_epochs=4)
    losses = {}
    for graph in (False, True):
        pair = [arms.Trial("elpv", arm, seed) for seed in (0, 1)]
        turns = [
            (torch.cuda.Stream(), trials.run(trial, setup, data, torch.device("cuda"), graph))
            for trial in pair
        ]
        while turns:
            for turn in list(turns):
                try:
                    with torch.cuda.stream(turn[0]):
                        next(turn[1])
                except StopIteration as end:
                    losses.setdefault(graph, []).append(end.value["losses"])
                    turns.remove(turn)
    assert losses[True][0] != losses[True][1]
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-2, atol=1e-2)
