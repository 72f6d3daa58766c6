"""Readers of ImageNet's layout, parquet files and shards: the images of a folder, in its order."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from localmamba.data import Augmentation, ImageSettings, InputSpec, Source, load_source
from localmamba.data.module import ImageData
from localmamba.data.shards import MAX_FILE, _expand

CLASSES = ("cat", "dog", "owl")
SPEC = InputSpec(size=8, channels=3, mean=(0.0,) * 3, std=(1.0,) * 3)


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


SETS = {
    "train": [(i // 8, png(i)) for i in range(24)],
    "val": [(i // 2, png(100 + i)) for i in range(6)],
}
"""Label and file of every image."""


def add_member(tar: tarfile.TarFile, name: str, content: bytes = b"", **header) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in header.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(content))


def write_shard(path: Path, samples: list[tuple[int, bytes]], start: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, (label, content) in enumerate(samples, start):
            add_member(tar, f"{i:04d}.cls", str(label).encode())
            add_member(tar, f"{i:04d}.png", content)
            add_member(tar, f"{i:04d}.json", b"{}")


def write_folder(root: Path) -> str:
    for split, samples in SETS.items():
        for i, (label, content) in enumerate(samples):
            path = root / split / CLASSES[label] / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return str(root)


def write_shards(root: Path) -> str:
    for first in range(0, 24, 10):
        write_shard(
            root / f"set-train-{first // 10:03d}.tar", SETS["train"][first : first + 10], first
        )
    write_shard(root / "set-validation-000.tar", SETS["val"])
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return f"wds/{root}"


def write_tables(root: Path) -> str:
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageColumn

    root.mkdir(exist_ok=True)
    features = Features({"image": ImageColumn(), "label": ClassLabel(names=list(CLASSES))})
    for split, name in (("train", "train"), ("val", "validation")):
        labels, files = zip(*SETS[split], strict=True)
        images = [{"bytes": content, "path": None} for content in files]
        table = Dataset.from_dict({"image": images, "label": list(labels)}, features=features)
        table.to_parquet(root / f"{name}-00000-of-00001.parquet")
    return f"hfds/{root}"


WRITERS = {"folder": write_folder, "shards": write_shards, "tables": write_tables}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Lets `datasets` write its files to a folder of the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))


def image_data(source: Source, workers: int = 0) -> ImageData:
    augmentation = Augmentation(crop_scale=(0.3, 1.0), auto_augment="rand-m9-mstd0.5")
    settings = ImageSettings(batch_size=5, workers=workers)
    data = ImageData(source, SPEC, settings, augmentation, seed=3)
    data.setup("fit")
    return data


def epoch(data: ImageData, number: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    loader = data.train_dataloader()
    loader.batch_sampler.set_epoch(number)
    return list(loader)


def assert_equal_batches(first, second) -> None:
    for (images, labels), (others, other_labels) in zip(first, second, strict=True):
        assert torch.equal(labels, other_labels)
        assert torch.equal(images, others)


@pytest.mark.parametrize("reader", ["shards", "tables"])
def test_readers_give_the_batches_of_a_folder(tmp_path, reader):
    folder = load_source(write_folder(tmp_path / "folder"))
    source = load_source(WRITERS[reader](tmp_path / reader))
    assert source.classes == folder.classes == CLASSES
    assert set(source.splits) == {"train", "val"}
    assert_equal_batches(epoch(image_data(folder)), epoch(image_data(source)))
    assert_equal_batches(
        list(image_data(folder).val_dataloader()), list(image_data(source).val_dataloader())
    )


@pytest.mark.parametrize("reader", list(WRITERS))
def test_a_resumed_epoch_has_the_rest_of_the_batches(tmp_path, reader):
    source = load_source(WRITERS[reader](tmp_path / "set"))
    whole = epoch(image_data(source), 1)
    assert len(whole) == 4
    again = image_data(source, workers=2)
    again.load_state_dict({"batches_done": 6, "passes": 1, "images": 24, "left_out": []})
    assert_equal_batches(whole[2:], epoch(again, 1))


@pytest.mark.parametrize("reader", ["shards", "tables"])
def test_unsplit_sets_are_split_and_models_give_the_labels(tmp_path, reader):
    path = WRITERS[reader](tmp_path / "set")
    for file in (tmp_path / "set").iterdir():
        if "validation" in file.name:
            file.unlink()
        elif file.suffix != ".txt":
            file.rename(file.with_name(file.name.replace("train", "all")))
    source = load_source(path, ImageSettings(held_out=0.25))
    assert np.bincount(source.split("val").labels).tolist() == [2, 2, 2]
    assert len(source.split("all")) == 24
    names = {source.split("val").name(i) for i in range(6)}
    assert not names & {source.split("train").name(i) for i in range(18)}


@pytest.mark.parametrize("reader", ["shards", "tables"])
def test_sets_are_labeled_by_the_classes_of_a_trained_model(tmp_path, reader):
    path = WRITERS[reader](tmp_path / "set")
    source = load_source(path, classes=["owl", "yak", "dog", "cat"])
    assert source.classes == ("owl", "yak", "dog", "cat")
    assert source.split("val").labels.tolist() == [3, 3, 2, 2, 0, 0]
    with pytest.raises(ValueError, match="not trained on: dog; known: owl, cat"):
        load_source(path, classes=["owl", "cat"])


def test_labels_without_names_are_numbers_of_classes(tmp_path):
    path = write_shards(tmp_path / "set")
    (tmp_path / "set" / "classes.txt").unlink()
    assert load_source(path).split("val").labels.tolist() == [0, 0, 1, 1, 2, 2]
    as_text = load_source(path, classes=["0", "10", "1", "2"])
    assert as_text.split("val").labels.tolist() == [0, 0, 2, 2, 3, 3]
    outputs = load_source(path, classes=["owl", "dog", "cat"])
    assert outputs.split("val").labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_shards_are_listed_by_pattern_or_info(tmp_path):
    write_shards(tmp_path)
    pattern = load_source(f"wds/{tmp_path}/set-train-{{000..002}}.tar")
    assert len(pattern.split("train")) + len(pattern.split("val")) == 24
    (tmp_path / "_info.json").write_text(
        '{"splits": {"train": {"filenames": ["set-train-{000..001}.tar"], "num_samples": 20},'
        ' "validation": {"filenames": "set-validation-000.tar"}}}'
    )
    listed = load_source(f"wds/{tmp_path}")
    assert (len(listed.split("train")), len(listed.split("val"))) == (20, 6)


def test_patterns_are_bounded():
    assert [str(p) for p in _expand("a/{x,y}-{09..11}.tar")] == [
        "a/x-09.tar", "a/x-10.tar", "a/x-11.tar", "a/y-09.tar", "a/y-10.tar", "a/y-11.tar",
    ]  # fmt: skip
    for pattern in ("{0..999999999}.tar", "{0..9999}{0..9999}.tar", "{5..1}.tar"):
        with pytest.raises(ValueError, match="names no shards, or more than 100000"):
            _expand(pattern)


def test_members_that_are_not_files_are_passed_over_and_nothing_is_unpacked(tmp_path):
    path = tmp_path / "set" / "train-0.tar"
    write_shard(path, SETS["train"])
    outside = tmp_path / "outside.png"
    with tarfile.open(path, "a") as tar:
        for i, name in enumerate(["../escape", "/tmp/absolute", "a/../../b"]):
            add_member(tar, f"{name}.png", png(50 + i))
            add_member(tar, f"{name}.cls", b"1")
        add_member(tar, "link.png", type=tarfile.SYMTYPE, linkname=str(outside))
        add_member(tar, "hard.png", type=tarfile.LNKTYPE, linkname="../../outside.png")
        add_member(tar, "device.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5)
        add_member(tar, "pipe.png", type=tarfile.FIFOTYPE)
        add_member(tar, "folder.png", type=tarfile.DIRTYPE)
    before = sorted(tmp_path.rglob("*"))
    source = load_source(f"wds/{path}")
    parts = [source.split(name) for name in ("train", "val")]
    assert sum(map(len, parts)) == 27  # names lead nowhere: they are only names
    assert [part.faults() for part in parts] == [{}, {}]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: p.write_bytes(b"no tar at all"), "is not a shard, an uncompressed tar file"),
        (lambda p: p.write_bytes(p.read_bytes()[:9000]), "is not a shard.*(cut short|unexpected)"),
        (lambda p: tarfile.open(p, "w:gz").close(), "is not a shard, an uncompressed tar"),
        (lambda p: tarfile.open(p, "w").close(), "holds no images"),
        (lambda p: write_shard(p, [(-1, png(0))]), r"the label in 0000\.cls is '-1', not a number"),
        (lambda p: write_shard(p, [(10**30, png(0))]), r"the label in 0000\.cls is '1000"),
        (lambda p: write_shard(p, [(10**9, png(0))]), "has the label 1000000000; allowed: 0 to"),
    ],
    ids=["text", "cut", "gzip", "empty", "negative", "long", "high"],
)
def test_damaged_shards_are_one_line(tmp_path, write, message):
    path = tmp_path / "train-0.tar"
    write_shard(path, SETS["train"])
    write(path)
    with pytest.raises(ValueError, match=message) as error:
        load_source(f"wds/{tmp_path}")
    assert "\n" not in str(error.value)


def test_samples_without_a_label_are_named(tmp_path):
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        add_member(tar, "a.png", png(0))
        add_member(tar, "b.cls", b"1")
    with pytest.raises(ValueError, match=r"2 samples of .* have no label or no image \(a, b\)"):
        load_source(f"wds/{tmp_path}")


def test_a_member_that_is_too_large_is_a_bad_image(tmp_path):
    write_shard(tmp_path / "train-0.tar", SETS["train"])
    with tarfile.open(tmp_path / "train-0.tar", "r:") as tar:
        start = tar.getmember("0003.png").offset
    with (tmp_path / "train-0.tar").open("r+b") as file:
        file.seek(start)
        header = tarfile.TarInfo.frombuf(file.read(512), "utf-8", "strict")
        header.size = MAX_FILE + 512
        file.seek(start)
        file.write(header.tobuf())
        file.truncate(start + 512 + 2 * MAX_FILE)  # sparse: no disk is used
    examples = load_source(f"wds/{tmp_path}").split("train")
    causes = {examples.name(i): cause for i, cause in examples.faults().items()}
    assert any(f"{MAX_FILE + 512} bytes; allowed: {MAX_FILE}" in cause for cause in causes.values())


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ("[]", "is not like"),
        ('{"splits": {"train": {"filenames": ["../x.tar"]}}}', "which is not in its folder"),
        ('{"splits": {"train": {"filenames": ["/x.tar"]}}}', "which is not in its folder"),
        ('{"splits": {"train": {"filenames": ["x.tar"]}}}', "which does not exist"),
    ],
)
def test_info_cannot_lead_out_of_its_folder(tmp_path, info, message):
    (tmp_path / "_info.json").write_text(info)
    with pytest.raises(ValueError, match=message):
        load_source(f"wds/{tmp_path}")


@pytest.mark.parametrize("path", ["pipe:touch x", "http://host/a.tar", "none/a-{0..3}.tar", ""])
def test_shards_are_local_files(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"(do|does) not exist"):
        load_source(f"wds/{path}")
    assert list(tmp_path.iterdir()) == []


def write_parquet(path: Path, **columns) -> None:
    from datasets import Dataset

    Dataset.from_dict(columns).to_parquet(path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: (p / "x.txt").touch(), "is not a local folder of parquet files"),
        (lambda p: (p / "train.parquet").write_text("x"), "cannot read hfds/"),
        (lambda p: write_parquet(p / "a.parquet", text=["x"]), "has the columns text; needed"),
        (
            lambda p: write_parquet(p / "a.parquet", image=[png(0)], label=[1.5]),
            "column 'label' is of float64; allowed: integers, text",
        ),
        (
            lambda p: [
                write_parquet(p / f"{n}.parquet", image=[png(0)], label=[0]) for n in ("train", "x")
            ],
            r"x\.parquet is not named after a split, others beside it are",
        ),
    ],
    ids=["empty", "damaged", "columns", "float labels", "mixed"],
)
def test_tables_that_cannot_be_used(tmp_path, write, message):
    write(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load_source(f"hfds/{tmp_path}")
    assert "\n" not in str(error.value)


def test_tables_of_bytes_with_labels_as_text_and_paths_that_are_not_followed(tmp_path):
    (tmp_path / "secret.png").write_bytes(png(0))
    images = [{"bytes": png(i), "path": "a.png"} for i in range(4)]
    images.append({"bytes": None, "path": str(tmp_path / "secret.png")})
    write_parquet(tmp_path / "a.parquet", image=images, label=["b", "a", "b", "a", "a"])
    examples = load_source(f"hfds/{tmp_path}").split("all")
    assert examples.labels.tolist() == [1, 0, 1, 0, 0]
    assert list(examples.faults()) == [4]
    assert "the bytes of the image are not in the table" in examples.faults()[4]


def write_imagenet(root: Path) -> Path:
    folder = root / "ILSVRC" / "Data" / "CLS-LOC"
    for i in range(8):
        path = folder / "train" / f"n0000000{i % 2}" / f"{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    (folder / "val").mkdir()
    for i in range(1, 5):
        (folder / "val" / f"ILSVRC2012_val_{i:08d}.JPEG").write_bytes(png(i))
    return folder


def test_imagenet_with_kaggles_labels(tmp_path):
    folder = write_imagenet(tmp_path)
    rows = [f"ILSVRC2012_val_{i:08d},n0000000{i // 3} 1 2 3 4" for i in (3, 1, 4, 2)]
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]))
    source = load_source(str(folder))
    assert source.classes == ("n00000000", "n00000001")
    val = source.split("val")
    assert val.labels.tolist() == [0, 0, 1, 1]
    assert [Path(path).name[-6] for path in val.images] == list("1234")


def test_imagenet_with_the_labels_of_its_devkit(tmp_path):
    from scipy.io import savemat

    folder = write_imagenet(tmp_path)
    devkit = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    devkit.mkdir(parents=True)
    synsets = np.array(
        [(1, "n00000001", "b"), (2, "n00000000", "a")],
        dtype=[("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("words", "O")],
    )
    savemat(devkit / "meta.mat", {"synsets": synsets})
    (devkit / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n1\n2\n1\n")
    assert load_source(str(folder)).split("val").labels.tolist() == [0, 1, 1, 1]


def test_flat_validation_images_need_labels(tmp_path):
    folder = write_imagenet(tmp_path)
    with pytest.raises(
        ValueError, match=r"val has images but no class folders; allowed: .*LOC_val"
    ):
        load_source(str(folder))
    (folder / "LOC_val_solution.csv").write_text("ILSVRC2012_val_00000001,n00000000 1")
    with pytest.raises(ValueError, match=r"3 images of .* have no label: ILSVRC2012_val_00000002"):
        load_source(str(folder))
    for path in (folder / "val").iterdir():
        path.rename(path.with_name(path.name.replace("ILSVRC2012", "other")))
    with pytest.raises(ValueError, match="val has images but no class folders"):
        load_source(str(folder))
