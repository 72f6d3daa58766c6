"""Fixtures of the commands: a folder of images, and a training run on it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from localmamba.cli import main

TINY = [
    "--model_args", "{embed_dim: 8, depth: 1, d_state: 2}", "--epochs", "2", "--warmup-epochs", "0",
    "--batch-size", "8", "--workers", "0", "--device", "cpu",
]  # fmt: skip


@pytest.fixture
def tiny() -> list[str]:
    """Options of a training that takes a second."""
    return TINY


@dataclass
class Said:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder, as the console script does."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: object) -> Said:
        capsys.readouterr()
        code = main([str(word) for word in argv])
        return Said(code, *capsys.readouterr())

    return run


def write_photos(root: Path, each: int = 12) -> Path:
    """Writes reddish and bluish images, 10 x 14."""
    generator = np.random.default_rng(0)
    for channel, name in ((0, "red"), (2, "blue")):
        (root / name).mkdir(parents=True)
        for i in range(each):
            pixels = generator.integers(0, 60, (10, 14, 3), dtype=np.uint8)
            pixels[..., channel] += 180
            Image.fromarray(pixels).save(root / name / f"{i:02d}.png")
    return root


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Folder of class folders, without splits."""
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="session")
def trained(photos, tmp_path_factory) -> Path:
    """Run folder of a training on `photos` that reaches 100 %."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    options = [*TINY, "--epochs", "12", "--lr", "0.02", "--mixup", "0", "--cutmix", "0"]
    augmentation = ["--color_jitter", "0", "--auto_augment", "null", "--erasing", "0"]
    words = ["train", "--data", photos, "--model", "localvim_demo", "--output", folder]
    assert main([str(word) for word in [*words, *options, *augmentation]]) == 0
    return folder
