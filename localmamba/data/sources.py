"""Data sets by name: scikit-learn's digits, Fashion-MNIST, folders, parquet files, shards."""

import gzip
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from localmamba.data.examples import Examples, Source
from localmamba.data.folders import load_folder
from localmamba.data.hugging_face import load_hugging_face
from localmamba.data.settings import ImageSettings
from localmamba.data.shards import load_shards
from localmamba.data.splits import join_names, stratified_split

DATA_NAMES = ("digits", "fashion-mnist")
"""Data sets known by name."""

READERS = {"hfds": load_hugging_face, "wds": load_shards}
"""Readers by the prefix of their path."""

FORMS = (
    f"{', '.join(DATA_NAMES)}, a folder of images, hfds/FOLDER (parquet files of Hugging Face), "
    "wds/FOLDER or wds/PATTERN-{000..146}.tar (WebDataset shards)"
)

FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
FASHION_DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def load_source(
    data: str, settings: ImageSettings | None = None, classes: Sequence[str] | None = None
) -> Source:
    """Loads a data set.

    Args:
        data: `digits`, `fashion-mnist`, a folder of images (see `load_folder`), `hfds/` and a
            folder of parquet files (see `load_hugging_face`), or `wds/` and a folder of shards or a
            pattern (see `load_shards`).
        settings: Split and download settings; by default `ImageSettings()`.
        classes: Classes of a trained model, in label order; by default those of the data.

    Raises:
        ValueError: If the data does not exist, the folder cannot be used, or it has classes that
            are not in `classes`.
    """
    settings = settings or ImageSettings()
    prefix, _, path = data.partition("/")
    reader = READERS.get(prefix) if path else None
    if reader is not None:
        path = os.path.expanduser(path)
        return reader(path, settings.held_out, settings.split_seed, classes)
    if data == "digits":
        source = load_digits()
    elif data == "fashion-mnist":
        source = load_fashion_mnist(settings.data_root)
    else:
        folder = Path(data).expanduser()
        if not folder.is_dir():
            fault = "is a file" if folder.exists() else "does not exist"
            raise ValueError(f"data {data!r} {fault}; allowed: {FORMS}")
        return load_folder(folder, settings.held_out, settings.split_seed, classes)
    if classes is not None and tuple(classes) != source.classes:
        raise ValueError(
            f"{data} has the classes {', '.join(source.classes)}; the model was trained on "
            f"{join_names(classes)}"
        )
    return source


def check_trainable(source: Source) -> None:
    """Raises ValueError unless there are training images, held-out images and two classes."""
    if "train" not in source.splits:
        raise ValueError(f"{source.name} has {', '.join(source.splits)} but no train split")
    if len(source.classes) < 2:
        raise ValueError(
            f"{source.name} has one class only ({source.classes[0]}); at least two are needed"
        )
    if not len(source.split(source.watched)):
        raise ValueError(
            f"{source.name} has too few images to hold some out; a class needs at least two"
        )


def load_digits() -> Source:
    """Loads scikit-learn's 1797 handwritten digits, 8 x 8; a fixed fifth is the test split."""
    from sklearn import datasets

    digits = datasets.load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    examples = Examples(images, digits.target.astype(np.int64))
    train, test = stratified_split(examples.labels, held_out=0.2, seed=0)
    splits = {"train": examples.subset(train), "test": examples.subset(test)}
    return Source("digits", tuple("0123456789"), 1, splits)


def load_fashion_mnist(root: str) -> Source:
    """Loads Fashion-MNIST, 28 x 28, with its published split of 60,000 and 10,000.

    Args:
        root: Folder of its four files, or of torchvision's FashionMNIST/raw. Downloads to it if
            neither the folder nor the Debian package has them.

    Raises:
        ValueError: If it is not found and cannot be downloaded.
    """
    folder = _find_fashion_mnist(Path(root).expanduser())
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = _read_idx(folder / f"{prefix}-images-idx3-ubyte", header=16).reshape(-1, 28, 28)
        labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte", header=8).astype(np.int64)
        splits[split] = Examples(images, labels)
    return Source("fashion-mnist", FASHION_CLASSES, 1, splits)


def _find_fashion_mnist(root: Path) -> Path:
    raw = root / "FashionMNIST" / "raw"
    for folder in (raw, root, FASHION_DEBIAN):
        if list(folder.glob("train-images-idx3-ubyte*")):
            return folder
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"fashion-mnist is neither in {root} nor in {FASHION_DEBIAN}, and its download failed "
            f"({error}); install the Debian package dataset-fashion-mnist, or pass its folder as "
            "--data_root"
        ) from None
    return raw


def _read_idx(path: Path, header: int) -> np.ndarray:
    packed = path.with_name(path.name + ".gz")
    content = path.read_bytes() if path.is_file() else gzip.decompress(packed.read_bytes())
    return np.frombuffer(content, np.uint8, offset=header)
