"""The CPU figures of docs/performance.md: our models beside DeiT-Ti, float32, two threads.

    python benchmarks/models_cpu.py [FOLDER]

Batch 1 for inference, 8 for training. Run it on an idle machine.
"""

import sys
from pathlib import Path

from localmamba.cli.bench import bench

MODELS = ["deit_tiny_patch16_224", "localvim_tiny", "localvmamba_tiny"]


def main(folder: Path) -> None:
    """Writes a CSV and a figure to <folder>/inference and <folder>/training."""
    for mode, batch in (("inference", 1), ("training", 8)):
        bench(MODELS, mode=mode, batch=batch, threads=2, seconds=10, output=folder / mode)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/models_cpu"))
