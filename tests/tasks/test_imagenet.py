"""ImageNet's classes by any of their names, released checkpoints, reassessed labels."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import localmamba  # noqa: F401 - registers the models
from localmamba.data import ImageSettings, InputSpec
from localmamba.tasks.checkpoints import Card
from localmamba.tasks.evaluation import load_evaluated
from localmamba.tasks.imagenet import RealLabels, describe, load_published, wnids

IDS = wnids()
NUMBERS = tuple(map(str, range(1000)))
AS_TEXT = tuple(sorted(NUMBERS))
SPEC = InputSpec(8, 3, (0.5,) * 3, (0.5,) * 3)


def folder(root: Path, names: list[str]) -> str:
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / name / "a.jpeg")
    return str(root)


def test_the_classes_are_those_of_imagenet():
    assert (len(IDS), IDS[0], IDS[999]) == (1000, "n01440764", "n15075141")
    assert describe(["n01443537", "cat"]) == ["goldfish, Carassius auratus", "cat"]


@pytest.mark.parametrize("classes", [IDS, AS_TEXT], ids=["by id", "by number"])
@pytest.mark.parametrize("names", [IDS, NUMBERS], ids=["ids", "numbers"])
def test_folders_get_the_outputs_of_their_class(classes, names, tmp_path):
    chosen = [0, 1, 2, 10, 100, 999]
    data = folder(tmp_path / "v2", [names[i] for i in chosen])
    source, split = load_evaluated(Card("m", {}, classes, SPEC), data, ImageSettings(), None)
    assert source.classes == classes
    examples = source.split(split)
    by_folder = {
        Path(p).parent.name: classes[i]
        for p, i in zip(examples.images, examples.labels, strict=True)
    }
    own = IDS if classes is IDS else NUMBERS
    assert by_folder == {names[i]: own[i] for i in chosen}


def test_numbers_are_no_names_for_the_classes_of_other_models(tmp_path):
    data = folder(tmp_path / "v2", ["0", "1"])
    card = Card("m", {}, ("cat", "dog"), SPEC)
    with pytest.raises(ValueError, match="not trained on: 0, 1; known: cat, dog"):
        load_evaluated(card, data, ImageSettings(), None)


def test_the_error_names_the_models_own_classes(tmp_path):
    data = folder(tmp_path / "pets", ["cat", "dog"])
    with pytest.raises(ValueError, match="not trained on: cat, dog; known: n01440764"):
        load_evaluated(Card("m", {}, IDS, SPEC), data, ImageSettings(), None)


def real(tmp_path: Path, labels: list[list[int]], classes=IDS) -> RealLabels:
    path = tmp_path / "real.json"
    path.write_text(json.dumps(labels))
    return RealLabels(str(path), classes)


def names(*numbers: int) -> list[str]:
    return [f"val/x/ILSVRC2012_val_{n:08d}.JPEG" for n in numbers]


def test_reassessed_labels_are_found_by_the_number_of_the_image(tmp_path):
    labels = real(tmp_path, [[7], [], [3, 4], [5]])
    ranked = np.array([[5, 1], [4, 0], [9, 9], [1, 7]])  # of images 4, 3, 2, 1
    found = labels.metrics(names(4, 3, 2, 1), ranked)
    assert found == {"real_accuracy": pytest.approx(2 / 3), "real_top5": 1.0, "real_images": 3}


def test_reassessed_labels_of_a_model_with_classes_sorted_as_text(tmp_path):
    labels = real(tmp_path, [[2]], AS_TEXT)
    assert labels.metrics(names(1), np.array([[AS_TEXT.index("2")]]))["real_accuracy"] == 1
    assert labels.metrics(names(1), np.array([[2]]))["real_accuracy"] == 0


def test_timm_brings_the_reassessed_labels():
    labels = RealLabels("timm", IDS).labels
    assert (len(labels), sum(map(bool, labels))) == (50000, 46837)  # as in the paper


@pytest.mark.parametrize(
    ("content", "classes", "message"),
    [
        ("[[1], [1000]]", IDS, "must be a list with a list of labels from 0 to 999"),
        ("{", IDS, "must be a list with a list"),
        ("[1, 2]", IDS, "must be a list with a list"),
        ("[]", ("cat", "dog"), "needs a model of the 1000 classes of ImageNet; this one has 2"),
    ],
)
def test_other_reassessed_labels_are_refused(content, classes, message, tmp_path):
    (tmp_path / "real.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        RealLabels(str(tmp_path / "real.json"), classes)


@pytest.mark.parametrize("image", ["val/x/1.jpeg", *names(0), *names(3)])
def test_images_without_a_number_are_refused(image, tmp_path):
    with pytest.raises(ValueError, match=r"needs images called .*00000001 to 00000002, got val"):
        real(tmp_path, [[1], [2]]).metrics([image], np.zeros((1, 1), int))


def released(path: Path, **arguments: int) -> torch.nn.Module:
    model = timm.create_model("localvim_demo", **arguments).eval()
    torch.save({"model": model.state_dict(), "epoch": 1}, path)
    return model


def test_a_released_checkpoint_is_a_model_of_imagenet(tmp_path):
    expected = released(tmp_path / "x.pth", num_classes=1000)
    model, card = load_published("localvim_demo", tmp_path / "x.pth")
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(images), expected(images))
    assert (card.classes, card.input.channels, model.training) == (IDS, 3, False)


@pytest.mark.parametrize("arguments", [{"num_classes": 10}, {"num_classes": 1000, "in_chans": 1}])
def test_a_released_checkpoint_that_does_not_fit_is_one_short_line(arguments, tmp_path):
    released(tmp_path / "x.pth", **arguments)
    with pytest.raises(ValueError, match=r"as localvim_demo: .* does not fit the model") as error:
        load_published("localvim_demo", tmp_path / "x.pth")
    assert len(str(error.value)) < 400
