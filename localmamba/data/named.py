"""Data sets known by name: scikit-learn's digits and Fashion-MNIST."""

import gzip
from pathlib import Path

import numpy as np

from localmamba.data.examples import Examples, Source, stratified_split

FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
FASHION_DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def load_digits() -> Source:
    """1797 handwritten digits, 8 x 8, shipped with scikit-learn; a fifth is held out."""
    from sklearn import datasets

    digits = datasets.load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    examples = Examples(images, digits.target.astype(np.int64))
    # A fixed split, so that figures can be compared.
    train, test = stratified_split(examples.labels, held_out=0.2, seed=0)
    splits = {"train": examples.subset(train), "test": examples.subset(test)}
    return Source("digits", tuple("0123456789"), 1, splits)


def load_fashion_mnist(root: str) -> Source:
    """60,000 and 10,000 pictures of clothes, 28 x 28, with their published split.

    Args:
        root: Folder of its four files, or of torchvision's FashionMNIST/raw; where neither it nor
            the Debian package has them, they are downloaded there.

    Raises:
        ValueError: If they are not found and cannot be downloaded.
    """
    folder = _find_fashion_mnist(Path(root).expanduser())
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = _read_idx(folder / f"{prefix}-images-idx3-ubyte", header=16).reshape(-1, 28, 28)
        labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte", header=8).astype(np.int64)
        splits[split] = Examples(images, labels)
    return Source("fashion-mnist", FASHION_CLASSES, 1, splits)


def _find_fashion_mnist(root: Path) -> Path:
    for folder in (root / "FashionMNIST" / "raw", root, FASHION_DEBIAN):
        if list(folder.glob("train-images-idx3-ubyte*")):
            return folder
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"fashion-mnist is neither in {root} nor in {FASHION_DEBIAN}, and its download failed "
            f"({error}); install the Debian package dataset-fashion-mnist, or name the folder that "
            "holds it with --data_root"
        ) from None
    return root / "FashionMNIST" / "raw"


def _read_idx(path: Path, header: int) -> np.ndarray:
    packed = path.with_name(path.name + ".gz")
    content = path.read_bytes() if path.is_file() else gzip.decompress(packed.read_bytes())
    return np.frombuffer(content, np.uint8, offset=header)
