"""The CPU figures of docs/performance.md: our models beside DeiT-Ti, float32, two threads.

    python benchmarks/models_cpu.py [FOLDER]

One image at a time for inference, eight for training. Nothing else may run on the machine.
"""

import sys
from pathlib import Path

from localmamba.cli.bench import bench

MODELS = ["deit_tiny_patch16_224", "localvim_tiny", "localvmamba_tiny"]


def main(folder: Path) -> None:
    """Writes <folder>/inference and <folder>/training, each with a CSV and a figure."""
    for mode, batch in (("inference", 1), ("training", 8)):
        bench(MODELS, mode=mode, batch=batch, threads=2, seconds=10, output=folder / mode)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/models_cpu"))
