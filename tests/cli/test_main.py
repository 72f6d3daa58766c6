"""The command line: help, options from files and recipes, errors in one line."""

import subprocess
import sys
from typing import Literal

import pytest

import localmamba.cli
from localmamba.cli import COMMANDS, main
from localmamba.cli.parser import make_parser, parse
from localmamba.data import ImageSettings
from localmamba.search import STRATEGIES

HERE = ("demo", "train", "evaluate", "predict", "tables", "bench")


def test_help_names_every_command(run):
    said = run("--help")
    assert said.code == 0
    assert all(f"  {name}" in said.out for name in COMMANDS)


def test_help_needs_no_heavy_library():
    code = (
        "import sys; from localmamba.cli import main; main(['--help']); "
        "assert not {'lightning', 'torchmetrics', 'matplotlib', 'jsonargparse'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_version(run):
    assert run("--version").out.startswith("localmamba 0")


@pytest.mark.parametrize("command", HERE)
def test_help_of_a_command(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: localmamba {command}")
    assert "Raises" not in text
    if command in ("train", "evaluate", "predict", "demo"):
        assert f"examples:\n  localmamba {command}" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["frobnicate"], "localmamba: unknown command 'frobnicate'; known: demo, search, train"),
        (["train"], "the following arguments are required: data, model"),
        (["train", "--data", "digits", "--epohcs", "3"], "unrecognized arguments: --epohcs"),
        (["train", "--data", "digits", "--lr", "big"], "--lr: Expected a float. Got value: big"),
        (["train", "--data", "digits", "--lr", "-1"], "lr must be above 0, got -1.0"),
        (["train", "--data", "digits", "--device", "tpu"], "'auto', 'cpu', 'cuda'"),
        (["train", "--data", "digits", "--config", "nope"], "config 'nope' is neither a file nor"),
        (["predict", "--checkpoint", "x"], "the following arguments are required: images"),
    ],
)
def test_wrong_words_are_one_line(run, words, message):
    said = run(*words)
    assert said.code == 2
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_a_config_with_an_unknown_key(run, tmp_path):
    (tmp_path / "own.yaml").write_text("epochs: 3\nepoch: 4\n")
    said = run("train", "--data", "digits", "--config", "own.yaml")
    assert said.code == 2
    assert "epoch" in said.err
    assert said.err.count("\n") == 1


def sample(
    words: list[str],
    data: str,
    kind: Literal["a", "b"],
    images: ImageSettings,
    flag: bool = False,
    epochs: int = 7,
) -> None:
    """Does something.

    Args:
        words: Some words.
        data: Some data.
        kind: One of two.
        images: Image settings.
        flag: A flag.
        epochs: Number of epochs.

    Examples:
      localmamba sample x
    """


def test_functions_become_options():
    found = parse("sample", sample, ["x", "y", "b", "--data", "d", "--flag", "--batch-size", "3"])
    assert found == {
        "words": ["x", "y"],
        "data": "d",
        "kind": "b",
        "images": ImageSettings(batch_size=3),
        "flag": True,
        "epochs": 7,
    }
    text = make_parser("sample", sample).format_help()
    assert "usage: localmamba sample WORDS... --data DATA KIND [options]" in text
    assert text.rstrip().endswith("examples:\n  localmamba sample x")


def test_recipes_configs_and_options_in_this_order(tmp_path):
    from localmamba.cli.train import train

    own = tmp_path / "own.yaml"
    own.write_text("lr: 0.5\nmin_lr: 0.25\n")
    words = ["--data", "digits", "--config", str(own), "--min-lr", "0.125"]
    job = parse("train", train, words)["job"]
    assert job.model == "localvim_demo"  # from the recipe of digits
    assert (job.training.lr, job.training.min_lr) == (0.5, 0.125)
    named = parse("train", train, ["--data", "x", "--config", "imagenet-localvim"])["job"]
    assert named.training.epochs == 300
    assert named.training.clip_grad is None  # nothing of the recipe `folder`
    assert parse("train", train, ["--data", "x"])["job"].training.epochs == 100  # recipe `folder`


@pytest.mark.parametrize("command", ["train", "search"])
def test_help_has_every_field_of_the_job(command, capsys):
    from localmamba.tasks import job

    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    kind = {"train": job.TrainingJob, "search": job.SearchJob}[command]
    options = kind(data="digits", model="localvim_demo").config()
    assert all(f" --{name} " in text for name in options)
    assert " --data DATA digits, fashion-mnist" in text  # the help of an inherited field
    assert all(name in text for name in STRATEGIES) or command == "train"


def test_arguments_of_a_recipes_model_are_for_that_model():
    from localmamba.cli.train import train

    words = ["--data", "fashion-mnist"]
    assert parse("train", train, words)["job"].model_args["patch_size"] == 2
    other = parse("train", train, [*words, "--model", "deit_tiny_patch16_224"])["job"]
    assert other.model_args == {}


def raising(monkeypatch, error: BaseException) -> None:
    def fail(*_):
        raise error

    monkeypatch.setattr(localmamba.cli, "_run", fail)


def test_faults_of_the_program_keep_their_traceback(run, monkeypatch):
    raising(monkeypatch, KeyError("a bug"))
    with pytest.raises(KeyError):
        run("tables")


def test_an_error_of_a_worker_process_is_its_last_line(run, monkeypatch):
    text = "Caught ValueError in worker process 0.\nOriginal Traceback:\n  x\nValueError: cut"
    raising(monkeypatch, ValueError(text))
    assert run("train").err == "localmamba train: ValueError: cut\n"


def test_a_library_that_is_not_installed(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.setitem(sys.modules, "lightning", None)
    for name in [name for name in sys.modules if name.startswith("localmamba.tasks.train")]:
        monkeypatch.delitem(sys.modules, name)
    said = run("train", "--data", "digits")
    assert said.code == 2
    assert "lightning" in said.err
    assert "pip install 'localmamba[train]'" in said.err
