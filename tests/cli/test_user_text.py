"""Names of classes, files and folders are printed and drawn as they are, not as markup."""

import shutil
from pathlib import Path

import pytest

from localmamba.cli.reports import make_console, print_paths, print_results

NAMES = ["cat[adult]", "w[/ph]", "[bold]x", ":smile:", r"\[red]"]


@pytest.mark.parametrize("name", NAMES)
def test_reports(name, capsys):
    console = make_console()
    print_results(console, f"{name} images", {name: {"accuracy": 0.5}}, f"note on {name}")
    print_paths(console, [Path(name) / "x.csv", Path(name) / f"{name.replace('/', '')}.csv"])
    out = capsys.readouterr().out
    assert out.count(name) >= 4
    assert name.replace("/", "") + ".csv" in out


def test_commands(run, photos, tiny, tmp_path):
    folder = tmp_path / "w[" / "ph]"
    folder.mkdir(parents=True)
    for found, name in (("red", "cat[adult]"), ("blue", "cat[kitten]")):
        shutil.copytree(photos / found, folder / name)
    words = ("--data", "w[/ph]", "--model", "localvim_demo", *tiny)
    said = run("train", *words, "--output", "r[/un]")
    assert said.code == 0, said.err
    assert "w[/ph], val images" in said.out
    assert "in r[/un]:" in said.out
    checkpoint = Path("r[/un]/model.safetensors")
    said = run("evaluate", "--checkpoint", checkpoint, "--data", "w[/ph]", "--output", "[/m]")
    assert (said.code, said.out.count("in [/m]:")) == (0, 1)
    said = run(
        "predict", folder / "cat[adult]" / "00.png", "n[bold].png", "--checkpoint", checkpoint
    )
    assert said.code == 2
    assert "cat[adult]" in said.out
    assert "cat[kitten]" in said.out
    assert said.err == "localmamba predict: no such file: n[bold].png\n"
