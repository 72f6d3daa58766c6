"""Data sets by name and from folders, and the errors of unusable folders."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from localmamba.data import (
    ImageSettings,
    check_trainable,
    load_source,
    stratified_split,
)

RNG = np.random.default_rng(0)


def write_image(path: Path, size: int = 12) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)
    return path


def write_classes(root: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        for i in range(count):
            write_image(root / name / f"{i:02d}.png")
    return root


def names(source, split: str) -> list[str]:
    return [Path(path).name for path in source.split(split).images]


def test_digits_hold_out_a_fixed_fifth_of_every_class():
    source = load_source("digits")
    train, test = source.split("train"), source.split("test")
    assert len(train) + len(test) == 1797
    shares = np.bincount(test.labels) / (np.bincount(test.labels) + np.bincount(train.labels))
    assert np.all(np.abs(shares - 0.2) < 0.01)
    again = load_source("digits", ImageSettings(split_seed=5)).split("test")
    assert np.array_equal(test.images, again.images)
    # No image is in both splits.
    seen = {image.tobytes() for image in train.images}
    assert sum(image.tobytes() in seen for image in test.images) == 0


def test_fashion_mnist_from_packed_files(tmp_path):
    for prefix, count in (("train", 3), ("t10k", 2)):
        images = bytes(16) + bytes(range(count)) * 784
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        labels = bytes(8) + bytes([7] * count)
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    source = load_source("fashion-mnist", ImageSettings(data_root=str(tmp_path)))
    assert source.split("train").images.shape == (3, 28, 28)
    assert source.classes[source.split("test").labels[0]] == "Sneaker"


def test_split_folders(tmp_path):
    write_classes(tmp_path / "train", {"b": 3, "a": 2})
    write_classes(tmp_path / "validation", {"a": 1, "b": 1})
    write_classes(tmp_path / "test", {"a": 1, "b": 1})
    (tmp_path / "train" / "a" / "notes.txt").write_text("not an image by name: left alone")
    write_classes(tmp_path / "train" / ".cache", {"thumbs": 1})
    source = load_source(str(tmp_path))
    assert source.classes == ("a", "b")
    assert source.split("train").labels.tolist() == [0, 0, 1, 1, 1]
    assert source.split("val").labels.tolist() == [0, 1]
    assert (source.watched, source.final) == ("val", "test")


def test_folder_that_is_not_split_is_split_by_its_own_seed(tmp_path):
    write_classes(tmp_path, {"a": 10, "b": 5, "train": 2})
    source = load_source(str(tmp_path))
    assert source.classes == ("a", "b", "train")
    assert np.bincount(source.split("val").labels).tolist() == [2, 1, 1]
    assert np.bincount(source.split("train").labels).tolist() == [8, 4, 1]
    assert len(source.split("all")) == 17
    assert not set(source.split("train").images) & set(source.split("val").images)
    assert names(source, "val") == names(load_source(str(tmp_path)), "val")
    other = load_source(str(tmp_path), ImageSettings(split_seed=1))
    assert names(source, "val") != names(other, "val")


def test_classes_of_a_trained_model_give_the_labels(tmp_path):
    write_classes(tmp_path, {"b": 2, "c": 2})
    source = load_source(str(tmp_path), classes=["c", "a", "b"])
    assert set(source.split("all").labels.tolist()) == {0, 2}
    with pytest.raises(
        ValueError, match=r"classes that the model was not trained on: b; known: a, c"
    ):
        load_source(str(tmp_path), classes=["a", "c"])


def test_stratified_split_keeps_a_lonely_example_for_training():
    first, second = stratified_split(np.array([0, 1, 1, 1, 1]), 0.5, seed=0)
    assert 0 in first
    assert sorted([*first, *second]) == [0, 1, 2, 3, 4]
    assert len(second) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "none", "does not exist; allowed: digits, fashion-mnist, a folder"),
        (lambda p: write_image(p / "x.png"), "is a file; allowed"),
        (lambda p: p, "has no class folders; it must have a folder for each class"),
        (lambda p: write_classes(p, {"a": 3}), r"has one class only \(a\)"),
        (lambda p: write_classes(p, {"a": 1, "b": 1}), "a class needs at least two"),
        (
            lambda p: [write_classes(p, {"a": 2}), (p / "b").mkdir()] and p,
            r"b has no images \(1 of 2 class folders are empty\); allowed: .bmp",
        ),
        (
            lambda p: write_classes(p / "test", {"a": 2, "b": 2}).parent,
            "has test but no train split",
        ),
        (
            lambda p: (
                [
                    write_classes(p / "train", {"a": 2, "b": 2}),
                    write_classes(p / "val", {"a": 1, "z": 1}),
                ]
                and p
            ),
            "class folders in .* differ: train lacks z; val lacks b",
        ),
    ],
    ids=["missing", "file", "no classes", "one class", "lonely", "empty", "no train", "differ"],
)
def test_folders_that_cannot_be_used(tmp_path, make, message):
    folder = str(make(tmp_path))
    with pytest.raises(ValueError, match=message) as error:
        check_trainable(load_source(folder))
    assert "\n" not in str(error.value)


def test_unknown_fashion_folder_says_where_it_looked(tmp_path, monkeypatch):
    from torchvision.datasets import FashionMNIST

    def unreachable(*_args, **_kwargs):
        raise RuntimeError("no internet")

    monkeypatch.setattr(FashionMNIST, "download", unreachable)
    monkeypatch.setattr("localmamba.data.sources.FASHION_DEBIAN", tmp_path / "debian")
    with pytest.raises(ValueError, match=r"neither in .* nor in .*debian.* download failed"):
        load_source("fashion-mnist", ImageSettings(data_root=str(tmp_path)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"workers": 10**5}, "workers must be 0 to 1024, got 100000"),
        ({"image_size": 0}, "image_size must be at least 1"),
        ({"held_out": 1.0}, "held_out must be between 0 and 1"),
        ({"bad_share": 2}, "bad_share must be between 0 and 1, got 2"),
        ({"crop_pct": 1.5}, "crop_pct must be above 0 and at most 1"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ImageSettings(**settings)
