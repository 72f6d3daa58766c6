"""The demo, on little data."""

import json

import pytest

import localmamba.recipes
from localmamba.data import Source
from localmamba.data.sources import load_digits


@pytest.fixture
def _short(monkeypatch):
    """Shortens the demo to one epoch on a few digits with models of one block."""
    whole = load_digits()
    few = {name: examples.subset(range(64)) for name, examples in whole.splits.items()}
    source = Source(whole.name, whole.classes, whole.channels, few)
    monkeypatch.setattr("localmamba.data.sources.load_digits", lambda: source)
    load = localmamba.recipes.load_recipe
    tiny = {"embed_dim": 8, "depth": 1, "d_state": 2}
    short = {"epochs": 1, "warmup_epochs": 0, "batch_size": 32, "model_args": tiny}
    monkeypatch.setattr(localmamba.recipes, "load_recipe", lambda *names: {**load(*names), **short})


@pytest.mark.usefixtures("_short")
def test_demo_leaves_what_it_promises(run, tmp_path):
    said = run("demo")
    assert said.code == 0
    folder = tmp_path / "runs" / "demo"
    for name in ("model.safetensors", "directions.json", "config.yaml", "metrics.json"):
        assert name in said.out
        assert (folder / name).is_file()
    for stem in ("directions", "curves"):
        assert (folder / f"{stem}.png").stat().st_size > 5000
        assert (folder / f"{stem}.svg").is_file()
    found = json.loads((folder / "directions.json").read_text())["directions"]
    assert found == json.loads((folder / "search" / "directions.json").read_text())["directions"]
    models = json.loads((folder / "metrics.json").read_text())["models"]
    assert list(models) == ["searched", "without search", "rows only"]
    assert len({model["parameters"] for model in models.values()}) == 1
    assert all(name in said.out for name in models)
    said = run("evaluate", "--checkpoint", folder / "model.safetensors", "--data", "digits")
    assert f"{100 * models['searched']['accuracy']:.2f}" in said.out
