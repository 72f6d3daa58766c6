"""`localmamba show`: figures of scan orders and directions, and errors."""

import json
from pathlib import Path

import pytest

from localmamba.cli.show import load_table


def test_scan_orders(run):
    said = run("show", "scan", "h", "w2_flip", "--grid", "4x6")
    assert (said.code, said.out.split()) == (0, ["scan-h-w2_flip.png", "scan-h-w2_flip.svg"])
    assert all(Path(path).is_file() for path in said.out.split())


def test_directions_of_models_and_files(run):
    Path("own[b].json").write_text(json.dumps([["h", "v"], ["w2", "w2_flip"]]))
    said = run("show", "directions", "localvmamba_tiny", "own[b].json", "--output", "figures/d")
    names = [
        f"figures/d-{name}.{kind}"
        for name in ("localvmamba_tiny", "own[b]")
        for kind in ("png", "svg")
    ]
    assert (said.code, said.out.split()) == (0, names)
    assert all(Path(name).is_file() for name in names)


@pytest.mark.parametrize(
    ("model", "depths"), [("localvmamba_tiny", (2, 2, 9, 2)), ("localvim_tiny", ())]
)
def test_stages_of_a_model(model, depths, tmp_path):
    table, title, found = load_table(model)
    assert (title, found) == (model, depths)
    saved = tmp_path / "directions.json"
    saved.write_text(json.dumps({"model": model, "directions": table}))
    assert load_table(str(saved)) == (table, model, depths)
    saved.write_text(json.dumps({"model": model, "directions": table[:1]}))
    assert load_table(str(saved)) == (table[:1], model, ())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("scan", "h", "--grid", "4"), "grid must be rows x columns, such as 14x14, got '4'"),
        (("scan", "sideways"), "unknown direction"),
        (("directions", "nope"), "'nope' is neither a file nor a model"),
        (("directions", "test_vit"), "test_vit has no scan directions"),
    ],
)
def test_wrong_names_are_one_line(run, words, message):
    said = run("show", *words)
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert message in said.err
