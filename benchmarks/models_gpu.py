"""The GPU figures of docs/performance.md: our models beside timm's, speed, memory and linearity.

    python benchmarks/models_gpu.py [FOLDER]

Batch 128 at 224 x 224 in bfloat16 autocast, launched from Python and replayed as CUDA graphs; then
sizes from 224 to 1024, with about as many tokens in each batch. Training is forward and backward
without an optimiser.
"""

import sys
from pathlib import Path

from localmamba.cli.bench import bench

TIMM = [
    "swin_tiny_patch4_window7_224",
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "convnext_tiny",
]
OURS = ["localvim_tiny", "localvim_small", "localvmamba_tiny", "localvmamba_small"]
GROWING = ["swin_tiny_patch4_window7_224", "deit_small_patch16_224", "localvmamba_tiny"]
BATCH_OF_SIZE = {224: 128, 384: 44, 512: 24, 768: 11, 1024: 6}


def main(folder: Path) -> None:
    """Writes <folder>/eager, /graph and /sizes, each with a CSV and a figure."""
    settings = {"device": "cuda", "dtype": "bfloat16", "seconds": 1.0}
    for launch in ("eager", "graph"):
        bench(TIMM + OURS, batch=128, launch=launch, output=folder / launch, **settings)
    sizes, batches = list(BATCH_OF_SIZE), list(BATCH_OF_SIZE.values())
    bench(GROWING, batch=batches, size=sizes, launch="graph", output=folder / "sizes", **settings)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/models_gpu"))
