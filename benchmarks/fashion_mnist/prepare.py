"""Packs the images of the study into a file for each data set, for machines without network.

    python benchmarks/fashion_mnist/prepare.py [runs]

Fashion-MNIST comes from the Debian package dataset-fashion-mnist if installed, else from
torchvision's download; the photographs of solar cells from PyPI's elpv-dataset (CC BY-NC-SA 4.0;
Deitsch et al., "Segmentation of photovoltaic module cells in electroluminescence images", 2021).
"""

import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from localmamba.data import load_source

ELPV = "elpv-dataset==1.0.0.post1"
SIDE = 84
"""Side of a photograph: patches of 6 make the grid of 14 x 14 of Fashion-MNIST's patches of 2."""


def fashion_mnist() -> dict[str, np.ndarray]:
    """Returns both splits: uint8 images [n, 28, 28], labels [n]."""
    arrays = {}
    for split, examples in load_source("fashion-mnist").splits.items():
        arrays[f"{split}_images"] = np.asarray(examples.images)
        arrays[f"{split}_labels"] = examples.labels.astype(np.uint8)
    return arrays


def elpv(wheel: Path) -> dict[str, np.ndarray]:
    """Returns uint8 photographs [n, 84, 84] and labels [n]: 1 where a defect is likelier than not.

    Args:
        wheel: The package's file.
    """
    images, labels = [], []
    with zipfile.ZipFile(wheel) as package:
        for line in package.read("elpv_dataset/data/labels.csv").decode().splitlines():
            name, probability, _ = line.split()
            with Image.open(io.BytesIO(package.read(f"elpv_dataset/data/{name}"))) as image:
                images.append(np.asarray(image.convert("L").resize((SIDE, SIDE), Image.BICUBIC)))
            labels.append(float(probability) > 0.5)
    return {"images": np.stack(images), "labels": np.array(labels, dtype=np.uint8)}


def main(folder: Path) -> None:
    """Writes both files."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", ELPV]
        subprocess.run([*pip, "--dest", temporary], check=True)
        photographs = elpv(next(Path(temporary).glob("*.whl")))
    for name, arrays in (("fashion-mnist", fashion_mnist()), ("elpv", photographs)):
        path = folder / f"{name}.npz"
        np.savez_compressed(path, **arrays)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs"))
