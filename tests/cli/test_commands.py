"""Commands train, evaluate and predict, run as by a user."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file


def accuracy(out: str) -> float:
    """Parses the accuracy in a table of results."""
    return float(re.search(r"(\d+\.\d\d)\s+\d+\.\d{4}\s+\d+\s*$", out, re.MULTILINE)[1])


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_train_leaves_a_run(trained):
    found = {path.name for path in trained.iterdir()}
    assert found == {
        ".lock",
        "config.yaml",
        "directions.json",
        "model.safetensors",
        "metrics.csv",
        "metrics.json",
        "curves.png",
        "curves.svg",
        "tensorboard",
    }
    assert len(read_csv(trained / "metrics.csv")) == 12
    assert json.loads((trained / "metrics.json").read_text())["accuracy"] == 1.0
    assert yaml.safe_load((trained / "config.yaml").read_text())["lr"] == 0.02


def test_evaluate_gives_the_figures_of_the_training(run, trained, photos):
    checkpoint = trained / "model.safetensors"
    said = run("evaluate", "--checkpoint", checkpoint, "--data", photos, "--output", "e")
    assert said.code == 0, said.err
    assert {path.name for path in Path("e").iterdir()} == {
        "metrics.json",
        "classes.csv",
        "predictions.csv",
        "confusion.png",
        "confusion.svg",
    }
    found, metrics = (json.loads((f / "metrics.json").read_text()) for f in (Path("e"), trained))
    assert {key: found[key] for key in ("split", "accuracy", "loss", "images")} == {
        key: metrics[key] for key in ("split", "accuracy", "loss", "images")
    }
    assert accuracy(said.out) == 100 * metrics["accuracy"]
    assert metrics["images"] == 4  # a fifth of 12, twice
    assert found["images_per_second"] > 0
    assert found["model_images_per_second"] > 0
    rows, classes = (read_csv(Path("e", name)) for name in ("predictions.csv", "classes.csv"))
    assert all(Path(row["image"]).parent.name == row["class"] == row["predicted"] for row in rows)
    assert [row["recall"] for row in classes] == ["1.0"] * 2


def test_evaluate_takes_all_images_of_a_folder_not_trained_on(run, trained, photos, tmp_path):
    other = shutil.copytree(photos, tmp_path / "others")
    said = run("evaluate", "--checkpoint", trained / "model.safetensors", "--data", other)
    assert "all images" in said.out
    assert accuracy(said.out) == 100
    found = json.loads(Path("runs/evaluate-localvim_demo-others/metrics.json").read_text())
    assert (found["split"], found["images"]) == ("all", 24)


def test_the_same_run_again_from_its_config(run, trained, tmp_path):
    said = run("train", "--config", trained / "config.yaml", "--output", "again")
    assert said.code == 0
    first, again = (load_file(f / "model.safetensors") for f in (trained, tmp_path / "again"))
    assert all((first[name] == again[name]).all() for name in first)


def test_predict_names_classes_and_agrees_with_evaluate(run, trained, photos):
    paths = [photos / "red" / "00.png", photos / "blue" / "01.png"]
    said = run("predict", *paths, "--checkpoint", trained / "model.safetensors", "--top", 1)
    assert (said.code, said.err) == (0, "")
    lines = said.out.replace("\n", "")
    assert re.search(r"red +\d+\.\d.*blue +\d+\.\d", lines)


def test_predict_goes_on_past_bad_files(run, trained, photos, tmp_path):
    shutil.copy(photos / "red" / "00.png", tmp_path / "good.png")
    whole = (photos / "red" / "00.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("hello")
    files = ("cut.png", "good.png", "text.png", "none.png")
    said = run("predict", *files, "--checkpoint", trained / "model.safetensors")
    assert said.code == 2
    assert "good.png" in said.out
    assert said.err.splitlines() == [
        "localmamba predict: cannot read cut.png: image file is truncated",
        "localmamba predict: cannot read text.png: not an image, or a damaged header",
        "localmamba predict: no such file: none.png",
    ]


def test_output_is_not_overwritten_unasked(run, photos, tiny):
    words = ("train", "--data", photos, "--model", "localvim_demo", *tiny, "--output", "r")
    assert run(*words).code == 0
    before = Path("r/model.safetensors").read_bytes()
    said = run(*words, "--seed", 1)
    assert said.code == 2
    assert "output r holds files already; name another or pass --overwrite" in said.err
    assert Path("r/model.safetensors").read_bytes() == before
    assert run(*words, "--seed", 1, "--overwrite").code == 0
    assert Path("r/model.safetensors").read_bytes() != before


def test_digits_and_a_directions_file(run, tiny):
    Path("d.json").write_text(json.dumps({"directions": [["v", "w7_flip"]]}))
    words = ("--data", "digits", "--model", "localvim_demo", "--directions", "d.json")
    assert run("train", *words, *tiny, "--epochs", 1, "--batch-size", 512).code == 0
    (folder,) = Path("runs").iterdir()
    assert folder.name == "train-localvim_demo-digits"
    found = json.loads((folder / "directions.json").read_text())["directions"]
    assert found == [["v", "w7_flip"]]
    Path("d.json").unlink()  # the checkpoint does not need it
    checkpoint = folder / "model.safetensors"
    assert run("evaluate", "--checkpoint", checkpoint, "--data", "digits").code == 0


def test_bad_images_stop_the_training_or_are_counted(run, photos, tiny, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "images")
    (folder / "red" / "00.png").write_text("x")
    words = ("train", "--data", folder, "--model", "localvim_demo", *tiny)
    said = run(*words)
    assert said.code == 2
    assert re.search(
        r"1 of \d+ images of 'train' cannot be read: .*red/00.png: .*; remove", said.err
    )
    assert not Path("runs").exists()
    said = run(*words, "--epochs", 1, "--bad-images", "skip")
    assert said.code == 0
    assert "localmamba train: warning: left out 1 of " in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("train", ("--data", "nope", "--model", "localvim_demo"), "data 'nope' does not exist"),
        ("train", ("--data", "digits", "--model", "localvim_demmo"), "did you mean: localvim_demo"),
        (
            "train",
            ("--data", "digits", "--directions", '[["h"], ["zz"], ["v"]]'),
            "rows for|unknown direction 'zz'",
        ),
        ("train", ("--data", "digits", "--directions", "no.json"), "cannot read directions from"),
        (
            "train",
            ("--data", "digits", "--model", "test_vit", "--directions", '["h"]'),
            "directions",
        ),
        ("train", ("--data", "digits", "--start_from", "no"), "no checkpoint 'no'"),
        ("evaluate", ("--checkpoint", "no", "--data", "digits"), "no checkpoint 'no'"),
        ("predict", ("a.png", "--checkpoint", "no"), "no checkpoint 'no'"),
        ("predict", ("a.png", "--checkpoint", "{trained}", "--top", "0"), "top must be at least 1"),
        (
            "evaluate",
            ("--checkpoint", "{trained}", "--data", "digits"),
            "digits has the classes 0,",
        ),
        ("evaluate", ("--checkpoint", "{trained}", "--data", "gone"), "data 'gone' does not exist"),
        (
            "evaluate",
            ("--checkpoint", "{trained}", "--data", "{photos}", "--split", "test"),
            "has no split 'test'; it has: all, train, val",
        ),
        ("evaluate", ("--data", "digits"), "name one checkpoint: --checkpoint FILE, or --released"),
        ("evaluate", ("--data", "digits", "--released", "no"), "released needs the name of its"),
        (
            "evaluate",
            ("--data", "digits", "--released", "no", "--model", "vim_tiny"),
            "no checkpoint file at 'no'",
        ),
        (
            "evaluate",
            ("--checkpoint", "{trained}", "--data", "{photos}", "--real", "timm"),
            "real needs a model of the 1000 classes of ImageNet; this one has 2",
        ),
    ],
)
def test_wrong_input_is_one_line(run, trained, photos, command, words, message):
    known = {"{trained}": trained / "model.safetensors", "{photos}": photos}
    said = run(command, *(known.get(word, word) for word in words))
    assert said.code == 2
    assert re.search(message, said.err)
    assert said.err.count("\n") == 1
    assert not Path("runs").exists()
