"""Data sets: scikit-learn's digits, Fashion-MNIST, and folders of images by class."""

import gzip
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from localmamba.data.examples import Examples, Source, stratified_split
from localmamba.data.settings import ImageSettings

DATA_NAMES = ("digits", "fashion-mnist")
"""Data sets known by name; any other name is a folder."""

FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
FASHION_DEBIAN = Path("/usr/share/datasets/fashion-mnist")

IMAGE_SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")
)
SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}


def load_source(
    data: str, settings: ImageSettings | None = None, classes: Sequence[str] | None = None
) -> Source:
    """Loads a data set.

    Args:
        data: `digits`, `fashion-mnist` or a folder of images (see `load_folder`).
        settings: Split and download settings; by default `ImageSettings()`.
        classes: Classes of a trained model, in label order; by default those of the data.

    Raises:
        ValueError: If the data does not exist, the folder cannot be used, or it has classes that
            are not in `classes`.
    """
    settings = settings or ImageSettings()
    if data == "digits":
        source = load_digits()
    elif data == "fashion-mnist":
        source = load_fashion_mnist(settings.data_root)
    else:
        folder = Path(data).expanduser()
        if not folder.is_dir():
            fault = "is a file" if folder.exists() else "does not exist"
            raise ValueError(
                f"data {data!r} {fault}; allowed: {', '.join(DATA_NAMES)}, or a folder of images"
            )
        return load_folder(folder, settings.held_out, settings.split_seed, classes)
    if classes is not None and tuple(classes) != source.classes:
        raise ValueError(
            f"{data} has the classes {', '.join(source.classes)}; the model was trained on "
            f"{_join_names(classes)}"
        )
    return source


def check_trainable(source: Source) -> None:
    """Raises ValueError unless there are training images, held-out images and two classes."""
    if "train" not in source.splits:
        raise ValueError(
            f"{source.name} has {', '.join(source.splits)} but no train folder of class folders"
        )
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


def load_folder(
    folder: Path, held_out: float, split_seed: int, classes: Sequence[str] | None = None
) -> Source:
    """Loads a folder of images.

    Args:
        folder: Either train/ with val/ (also validation/, valid/) or test/, each with a folder per
            class; or the class folders themselves, which are split here and also kept whole as
            the split `all`. Images may be at any depth of a class folder.
        held_out: Fraction of each class held out if there is neither val/ nor test/.
        split_seed: Seed of that split.
        classes: Class names in label order; by default the folder names, sorted.

    Raises:
        ValueError: If there are no class folders, one is empty or not in `classes`, or, without
            `classes`, those of two splits differ.
    """
    roots = _split_roots(folder) or {"all": folder}
    files = {split: list_images(root) for split, root in roots.items()}
    if classes is None:
        _check_equal_classes(folder, files)
    classes = tuple(classes or sorted(next(iter(files.values()))))
    splits = {split: _label_files(roots[split], files[split], classes) for split in roots}
    if "val" not in splits and "test" not in splits:
        whole = splits.get("all") or splits["train"]
        train, val = stratified_split(whole.labels, held_out, split_seed)
        splits |= {"train": whole.subset(train), "val": whole.subset(val)}
    return Source(str(folder.resolve()), classes, 3, splits)


def list_images(root: Path) -> dict[str, list[str]]:
    """Lists the image files of every class folder in `root`, sorted.

    Raises:
        ValueError: If there are no class folders, or a class has no images.
    """
    names = _class_folders(root)
    if not names:
        raise ValueError(f"{root} has no class folders; it must have a folder for each class")
    files = {name: _list_files(root / name) for name in names}
    if empty := [name for name, paths in files.items() if not paths]:
        raise ValueError(
            f"class folder {root / empty[0]} has no images ({len(empty)} of {len(names)} class "
            f"folders are empty); allowed: {' '.join(sorted(IMAGE_SUFFIXES))}"
        )
    return files


def _split_roots(folder: Path) -> dict[str, Path]:
    # A class may be called `train` too: a split folder has class folders, a class folder images.
    found = {
        split: [folder / name for name in names if (folder / name).is_dir()]
        for split, names in SPLIT_FOLDERS.items()
    }
    roots = {split: [f for f in folders if _class_folders(f)] for split, folders in found.items()}
    return {split: folders[0] for split, folders in roots.items() if folders}


def _class_folders(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _list_files(folder: Path) -> list[str]:
    paths = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                paths.append(os.path.join(parent, name))
    return sorted(paths)


def _check_equal_classes(folder: Path, files: dict[str, dict[str, list[str]]]) -> None:
    (first, expected), *others = files.items()
    for split, found in others:
        lacks = {
            first: sorted(set(found) - set(expected)),
            split: sorted(set(expected) - set(found)),
        }
        if faults := [
            f"{name} lacks {_join_names(names)}" for name, names in lacks.items() if names
        ]:
            raise ValueError(f"class folders in {folder} differ: {'; '.join(faults)}")


def _label_files(root: Path, files: dict[str, list[str]], classes: tuple[str, ...]) -> Examples:
    if foreign := sorted(set(files) - set(classes)):
        raise ValueError(
            f"{root} has classes that the model was not trained on: {_join_names(foreign)}; "
            f"known: {_join_names(classes)}"
        )
    pairs = [(path, i) for i, name in enumerate(classes) for path in files.get(name, ())]
    return Examples([path for path, _ in pairs], np.array([i for _, i in pairs], dtype=np.int64))


def _join_names(names: Sequence[str], limit: int = 10) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
