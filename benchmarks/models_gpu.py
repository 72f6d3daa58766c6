"""The GPU figures of docs/performance.md: our models beside timm's, speed, memory and linearity.

    python benchmarks/models_gpu.py [FOLDER] [PART ...]

In bfloat16 autocast; training is forward and backward without an optimizer step. Parts, by default
all:

    eager         batch 128 at 224 x 224, kernels launched from Python
    graph         the same, as CUDA graphs
    same_batch    batch 32 at 224 to 1024 pixels, inference, as CUDA graphs
    same_tokens   224 to 1024 pixels at about the same number of tokens per batch, as CUDA graphs
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
SIZES = list(BATCH_OF_SIZE)

PARTS = {
    "eager": {"models": TIMM + OURS, "batch": 128, "launch": "eager"},
    "graph": {"models": TIMM + OURS, "batch": 128, "launch": "graph"},
    "same_batch": {
        "models": GROWING, "batch": 32, "size": SIZES, "mode": "inference", "launch": "graph"
    },
    "same_tokens": {
        "models": GROWING, "batch": list(BATCH_OF_SIZE.values()), "size": SIZES, "launch": "graph"
    },
}  # fmt: skip


def main(folder: Path, parts: list[str]) -> None:
    """Writes a folder with a CSV and a figure for each part."""
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        sys.exit(f"parts are {', '.join(PARTS)}, got {', '.join(unknown)}")
    for part in parts:
        try:
            bench(**PARTS[part], device="cuda", dtype="bfloat16", seconds=0.6, output=folder / part)
        except ValueError as error:
            sys.exit(f"{part}: {error}")


if __name__ == "__main__":
    folder, *parts = sys.argv[1:] or ["runs/models_gpu"]
    main(Path(folder), parts or list(PARTS))
