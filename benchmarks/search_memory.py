"""Memory and time of a search step at the paper's size: 20 blocks, 128 candidates each.

    PYTHONPATH=. python benchmarks/search_memory.py [--batch 64] [--output runs/search_memory.json]

The paper (section 4.2) reports 28 GB for that size, without batch or image size. Here: the LocalVim
supernet of width 128, 224 x 224 images, bfloat16 autocast, AdamW with float32 states. Memory is the
peak of allocated memory in a step, including weights and optimizer state; for sampled strategies,
in a step that updates alpha too. For quality see benchmarks/fashion_mnist.
"""

import argparse
import gc
import json
import time
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import localmamba  # noqa: F401 - registers the models
from localmamba.ops import PADDING, scan_order
from localmamba.search import SearchSettings, find_mixers, make_strategy, search_step

GRID = (14, 14)
CANDIDATES = 128
KEEP = 4
CLASSES = 1000


@dataclass(frozen=True)
class Case:
    """A configuration of a search step.

    Attributes:
        strategy: Name in `localmamba.search.STRATEGIES`.
        chunk_size: Number of directions per chunk, 0 for all.
        checkpointing: Whether to recompute blocks in the backward pass.
    """

    strategy: str
    chunk_size: int = 0
    checkpointing: bool = False


CASES = (
    Case("softmax", chunk_size=8, checkpointing=True),
    Case("softmax", checkpointing=True),
    Case("single_path"),
    Case("single_path", checkpointing=True),
    Case("binary_gates"),
    Case("binary_gates", checkpointing=True),
    Case("partial_channels", chunk_size=8, checkpointing=True),
)


def many_directions(count: int) -> list[str]:
    """Returns `count` directions of different orders on a 14 x 14 grid, each before its flip.

    Rows, columns and the other orders come first, then windows by increasing padding.
    """
    sides = range(1, 15)
    windows = [f"w{h}x{w}" for h in sides for w in sides]
    windows.sort(key=lambda name: scan_order(name, GRID).index.size)
    orders: dict[bytes, str] = {}
    for name in ["h", "v", "snake", "diagonal", "hilbert", *windows]:
        index = scan_order(name, GRID).index
        orders.setdefault(index[index != PADDING].tobytes(), name)
    return [name for base in orders.values() for name in (base, f"{base}_flip")][:count]


def measure(case: Case, batch: int, timed: int) -> dict:
    """Measures gigabytes and seconds per step of a case."""
    gc.collect()  # hooks of the previous case hold its model in a reference cycle
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.manual_seed(0)
    candidates = many_directions(CANDIDATES)
    with torch.device("cuda"):
        model = timm.create_model("localvim_search", directions=candidates)
    settings = SearchSettings(keep=KEEP, choice_warmup=0.0)
    strategy = make_strategy(case.strategy, model, settings)
    model.cuda().set_grad_checkpointing(case.checkpointing)
    for mixer in find_mixers(model):
        mixer.chunk_size = case.chunk_size
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    images = torch.randn(batch, 3, 224, 224, device="cuda")
    labels = torch.randint(CLASSES, (batch,), device="cuda")

    def loss_of(_: object) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(images)
        return F.cross_entropy(logits.float(), labels)

    def step() -> None:
        search_step(strategy, loss_of, optimizer, None, images, progress=0.5)

    seconds = time_of(step, timed)
    return {
        "gigabytes": (torch.cuda.max_memory_allocated() - before) / 1e9,
        "seconds": seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def time_of(step, timed: int) -> float:
    """Returns seconds per step after warm-up; resets the peak memory statistics before timing."""
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(timed):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / timed


def main() -> None:
    """Prints a line per case and writes all of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--timed", type=int, default=3, help="number of timed steps")
    parser.add_argument("--output", type=Path, default=Path("runs/search_memory.json"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("search_memory needs a GPU: it measures GPU memory")
    device = torch.cuda.get_device_name()
    common = {"batch": arguments.batch, "device": device, "torch": torch.__version__}
    rows = []
    for case in CASES:
        try:
            figures = measure(case, arguments.batch, arguments.timed)
        except torch.cuda.OutOfMemoryError:
            figures = {"gigabytes": None, "seconds": None}
        rows.append({**vars(case), **common, **figures})
        print(json.dumps(rows[-1]), flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
