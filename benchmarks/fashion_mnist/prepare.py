"""Packs Fashion-MNIST into one file, for machines without network.

    python benchmarks/fashion_mnist/prepare.py [runs/fashion_mnist.npz]

Uses the Debian package dataset-fashion-mnist if installed, else torchvision's download.
"""

import sys
from pathlib import Path

import numpy as np

from localmamba.data import load_source


def main(path: Path) -> None:
    """Writes uint8 images [n, 28, 28] and labels [n] of both splits, compressed (about 30 MB)."""
    source = load_source("fashion-mnist")
    arrays = {}
    for split, examples in source.splits.items():
        arrays[f"{split}_images"] = np.asarray(examples.images)
        arrays[f"{split}_labels"] = examples.labels.astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/fashion_mnist.npz"))
