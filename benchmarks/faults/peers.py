"""Plain Lightning and timm's train script under kills, SIGTERM and damaged checkpoints.

python benchmarks/faults/peers.py TIMM --output FILE      # TIMM: a checkout of pytorch-image-models
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

LIGHTNING = """
import sys, torch
from torch import nn
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1500, 1500)
    def training_step(self, batch, _):
        return self.layer(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())
folder, resume = sys.argv[1], sys.argv[2] == "resume"
data = torch.utils.data.DataLoader(torch.randn(400, 1500), batch_size=4)
saving = ModelCheckpoint(folder, every_n_train_steps=2, save_last=True)
trainer = Trainer(
    accelerator="cpu", max_epochs=3 if resume else 100, callbacks=[saving], logger=False,
    enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
)
trainer.fit(Model(), data, ckpt_path="last" if resume else None)
"""


def write_images(root: Path) -> None:
    """Writes two classes of random images, for training and validation."""
    rng = np.random.default_rng(0)
    for split in ("train", "validation"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for i in range(32):
                pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")


def words(peer: str, timm: Path, data: Path, folder: Path, resume: bool) -> list[str]:
    """Returns the command of a peer."""
    if peer == "lightning":
        return [sys.executable, "-c", LIGHTNING, str(folder), "resume" if resume else "start"]
    command = [
        sys.executable, str(timm / "train.py"), str(data), "--model", "test_vit2", "--num-classes",
        "2", "--img-size", "64", "-b", "16", "--workers", "0", "--device", "cpu",
        "--warmup-epochs", "0",
        "--epochs", "3" if resume else "500", "--output", str(folder), "--experiment", "x",
    ]  # fmt: skip
    return [*command, "--resume", str(folder / "x" / "last.pth.tar")] * resume or command


def last(peer: str, folder: Path) -> Path:
    """Returns the newest checkpoint."""
    return folder / ("last.ckpt" if peer == "lightning" else "x/last.pth.tar")


def run(timm: Path, count: int, output: Path | None) -> None:
    """Runs the trials and writes what was counted."""
    rng = random.Random(0)
    found: dict[str, dict[str, int]] = {}
    with TemporaryDirectory() as root, TemporaryDirectory(dir="/dev/shm") as temporary:
        data = Path(root, "data")
        write_images(data)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": temporary}

        def start(peer: str, folder: Path, resume: bool = False) -> subprocess.Popen[str]:
            folder.mkdir(parents=True, exist_ok=True)
            return subprocess.Popen(
                words(peer, timm, data, folder, resume), env=environment, text=True,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )  # fmt: skip

        for peer in ("lightning", "timm"):
            counted: Counter[str] = Counter()
            for number in range(count):
                folder = Path(root, f"{peer} {number}")
                process = start(peer, folder)
                path = last(peer, folder)
                while not path.exists() and process.poll() is None:
                    time.sleep(0.05)
                time.sleep(rng.uniform(0, 1.5))
                sent = signal.SIGTERM if number % 4 == 3 else signal.SIGKILL
                process.send_signal(sent)
                process.communicate()
                if sent == signal.SIGTERM:
                    counted[f"SIGTERM: exit code {process.returncode}"] += 1
                    continue
                counted["SIGKILL"] += 1
                try:
                    torch.load(path, weights_only=False)
                    counted["SIGKILL: last checkpoint loads"] += 1
                except Exception as error:
                    counted[f"SIGKILL: last checkpoint {type(error).__name__}"] += 1
            good = Path(root, f"{peer} 0")
            path = last(peer, good)
            if path.exists():
                content = bytearray(path.read_bytes())
                for kind in ("cut", "flipped"):
                    if kind == "cut":
                        path.write_bytes(content[: len(content) // 2])
                    else:
                        content[len(content) // 2] ^= 1
                        path.write_bytes(content)
                    process = start(peer, good, resume=True)
                    text = process.communicate()[1]
                    lines = text.count("\n")
                    counted[
                        f"{kind} checkpoint: exit code {process.returncode}, {lines} lines"
                    ] += 1
            found[peer] = dict(counted)
            print(peer, found[peer], flush=True)
            if output is not None:
                output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("timm", type=Path)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--output", type=Path)
    run(**vars(parser.parse_args()))
