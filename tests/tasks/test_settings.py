"""Learning rates, parameter groups, models by name, recipes: what settings come to."""

import dataclasses

import pytest
import timm
import torch
import yaml

from localmamba.cli.parser import parse
from localmamba.cli.train import train
from localmamba.data import ImageSettings, InputSpec
from localmamba.models.loading import build_model
from localmamba.recipes import default_recipe, find_recipe, list_recipes, load_recipe
from localmamba.tasks.building import input_spec, model_arguments, model_directions
from localmamba.tasks.job import SearchJob, TrainingJob
from localmamba.tasks.optimization import make_optimizer, make_schedule, rate_at
from localmamba.tasks.settings import Hardware, TrainingSettings
from localmamba.tasks.trainer import make_trainer

SETTINGS = TrainingSettings(
    epochs=10, lr=1.0, warmup_epochs=2, warmup_lr=0.1, min_lr=0.01, weight_decay=0.3
)
RGB = InputSpec(8, 3, (0.5,) * 3, (0.5,) * 3)
DEMO = {"depth": 2, "embed_dim": 8, "num_classes": 2}


def test_learning_rate_warms_up_and_falls_as_a_cosine():
    rates = {p: rate_at(p, SETTINGS) for p in (0.0, 0.1, 0.2, 0.6, 1.0)}
    assert rates == pytest.approx({0.0: 0.1, 0.1: 0.55, 0.2: 1.0, 0.6: 0.505, 1.0: 0.01})
    assert rate_at(0.0, TrainingSettings(warmup_epochs=0, lr=0.5)) == 0.5


def test_schedule_follows_the_steps():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=SETTINGS.lr)
    schedule = make_schedule(optimizer, SETTINGS, steps=20)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([rate_at(i / 20, SETTINGS) for i in range(20)])


def test_what_has_no_weight_decay():
    model = build_model("localvim_demo", DEMO)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {
        names[id(parameter)]: group["weight_decay"] == 0.3
        for group in make_optimizer(model, SETTINGS).param_groups
        for parameter in group["params"]
    }
    assert len(decayed) == len(names)
    for name, decays in decayed.items():
        last = name.rsplit(".", 1)[-1]
        without = last in ("A_log", "D", "dt_bias", "pos_embed", "bias") or "norm" in name
        assert decays != without, name


def test_input_follows_the_model_unless_the_settings_say_otherwise():
    assert input_spec("localvim_demo", ImageSettings(), 1).size == 8
    tiny = input_spec("localvim_tiny", ImageSettings(), 3)
    assert (tiny.size, tiny.crop_pct, len(tiny.mean)) == (224, 0.875, 3)
    assert input_spec("localvim_tiny", ImageSettings(image_size=64), 3).size == 64
    assert len(input_spec("localvim_tiny", ImageSettings(), 1).mean) == 1


@pytest.mark.parametrize("name", ["resnet18", "localvim_demo", "test_vit"])
def test_models_take_another_image_size(name):
    spec = InputSpec(48, 3, (0.5,) * 3, (0.5,) * 3)
    model = build_model(name, model_arguments(name, spec, 5)).eval()
    with torch.inference_mode():
        assert model(torch.randn(1, 3, 48, 48)).shape == (1, 5)


def test_directions_of_a_model():
    rows = [["h", "v"], ["w2", "snake_flip"]]
    model = build_model("localvim_demo", {**DEMO, "directions": rows})
    assert model_directions(model) == rows
    assert model_directions(build_model("test_vit", {})) == []


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("localvim_tny", {}, "unknown model 'localvim_tny'; did you mean: localvim_tiny"),
        ("test_vit", {"directions": [["h"]]}, r"test_vit: .*directions"),
        ("localvim_demo", {"embed_dimm": 8}, r"localvim_demo: .*embed_dimm"),
        ("localvim_demo", {**DEMO, "directions": [["h"]] * 3}, "3 rows for 2 blocks"),
        ("localvim_demo", {**DEMO, "directions": ["z"]}, "unknown direction 'z'; known: h"),
        ("localvim_demo", {**DEMO, "directions": ["w0"]}, "sizes must be at least 1"),
        ("localvim_demo", {**DEMO, "directions": "none.json"}, "cannot read directions from"),
    ],
)
def test_models_that_cannot_be_built(name, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        build_model(name, arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainingSettings(epochs=10**12), "epochs must be 1 to 1000000, got 1000"),
        (lambda: TrainingSettings(epochs=3, warmup_epochs=3), "below epochs"),
        (lambda: TrainingSettings(lr=0), "lr must be above 0"),
        (lambda: TrainingSettings(lr=1e-3, min_lr=1e-2), "min_lr must be 0 to lr"),
        (lambda: TrainingSettings(label_smoothing=1), "label_smoothing must be at least 0"),
        (lambda: Hardware(devices=0), "devices must be 1 to 1024, got 0"),
        (lambda: Hardware(threads=10**6), "threads must be 1 to 1024"),
        (
            lambda: make_trainer(Hardware("cpu", precision="16-mixed")),
            "precision 16-mixed needs a GPU; allowed on a CPU: 32, bf16-mixed",
        ),
        (lambda: TrainingJob.from_config({"data": "digits"}), "model"),
        (lambda: TrainingJob.from_config({"data": "d", "model": "m", "lrr": 1}), "lrr"),
    ],
)
def test_wrong_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(ValueError, match="device cuda: PyTorch finds no GPU here"):
        make_trainer(Hardware("cuda"))


@pytest.mark.parametrize("kind", [TrainingJob, SearchJob])
def test_recipes_are_jobs(kind):
    command = {"training": "train", "search": "search"}[kind.kind]
    for name in list_recipes(command):
        job = kind.from_config({"data": "digits", **load_recipe(command, name)})
        assert timm.is_model(job.model), name
        # The saved configuration gives the same job again.
        assert kind.from_config(yaml.safe_load(yaml.safe_dump(_lists(job.config())))) == job


def _lists(config: dict) -> dict:
    return {key: list(v) if isinstance(v, tuple) else v for key, v in config.items()}


def test_which_recipe_belongs_to_which_data(tmp_path):
    assert default_recipe("train", "digits") == "digits"
    assert default_recipe("train", "some/where") == "folder"
    assert default_recipe("evaluate", "digits") is None
    own = tmp_path / "own.yaml"
    own.write_text("epochs: 1")
    assert find_recipe("train", str(own)) == own
    with pytest.raises(ValueError, match="neither a file nor a recipe of train: digits, "):
        find_recipe("train", "nope")


def test_layer_decay_lowers_the_rates_of_early_blocks():
    settings = dataclasses.replace(SETTINGS, layer_decay=0.5)
    model = build_model("localvim_demo", {**DEMO, "depth": 3})
    optimizer = make_optimizer(model, settings)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {
        names[id(parameter)]: group
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    layers = ("pos_embed", "blocks.0.norm.weight", "blocks.1.mixer.in_proj.weight", "head.weight")
    assert [groups[name]["lr"] for name in layers] == pytest.approx([0.0625, 0.125, 0.25, 1.0])
    assert groups["blocks.1.mixer.branches.A_log"]["weight_decay"] == 0
    schedule = make_schedule(optimizer, settings, steps=20)
    for _ in range(10):
        optimizer.step()
        schedule.step()
    rate = rate_at(0.5, settings)
    assert [groups[name]["lr"] / rate for name in layers] == pytest.approx([0.0625, 0.125, 0.25, 1])


IMAGENET = {
    "epochs": 300, "batch_size": 1024, "lr": 1e-3, "warmup_epochs": 20, "warmup_lr": 1e-7,
    "min_lr": 1e-6, "weight_decay": 0.04, "label_smoothing": 0.1, "crop_scale": (0.08, 1.0),
    "color_jitter": 0.3, "auto_augment": "rand-m9-mstd0.5", "hflip": 0.5, "erasing": 0.25,
    "mixup": 0.2, "cutmix": 1.0, "ema": 0.9999,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "model", "drop_path", "clip_grad"),
    [
        ("imagenet-localvim", "localvim_tiny", 0.1, None),
        ("imagenet-vim", "vim_tiny", 0.1, None),
        ("imagenet-localvmamba", "localvmamba_tiny", 0.2, 1.0),
        ("imagenet-vmamba", "vmamba_tiny", 0.2, 1.0),
    ],
)
def test_recipes_of_imagenet_are_the_papers(name, model, drop_path, clip_grad):
    job = parse("train", train, ["--data", "some/where", "--config", name])["job"]
    own = {"model": model, "drop_path": drop_path, "clip_grad": clip_grad}
    assert job.config() | IMAGENET | own == job.config()


def test_a_config_may_extend_a_recipe(tmp_path):
    own, other = tmp_path / "own.yaml", tmp_path / "other.yaml"
    own.write_text(f"extends: {other}\nlr: 0.5\n")
    other.write_text("extends: imagenet-localvmamba\nlr: 0.25\nepochs: 70\n")
    job = parse("train", train, ["--data", "digits", "--config", str(own)])["job"]
    assert (job.model, job.training.lr, job.training.epochs) == ("localvmamba_tiny", 0.5, 70)
    for text, message in (
        (f"extends: {own}", "other.yaml extends itself|own.yaml extends itself"),
        ("- 3", "other.yaml must hold settings"),
        ("a: [", "other.yaml is no YAML"),
        ("extends: nope", "config 'nope' is neither a file nor a recipe of train"),
    ):
        other.write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            load_recipe("train", str(own))
        assert "\n" not in str(error.value)
