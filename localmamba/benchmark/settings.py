"""What is measured, and what comes of it."""

from dataclasses import dataclass

import timm
import torch

MODES = ("inference", "training")
"""A forward pass without gradients; a forward pass, a cross entropy and a backward pass."""

DEVICES = ("cpu", "cuda")

LAUNCHES = ("eager", "graph")
"""Kernel by kernel from Python, or a whole step replayed as one CUDA graph."""

TOKEN = 16
"""Pixels along the side of what counts as one token where sizes are compared."""


@dataclass(frozen=True)
class Precision:
    """How a model computes: under autocast or not, and whether float32 products may use TF32."""

    autocast: torch.dtype | None
    tf32: bool


DTYPES = {
    "float32": Precision(None, tf32=False),
    "tf32": Precision(None, tf32=True),
    "bfloat16": Precision(torch.bfloat16, tf32=True),
    "float16": Precision(torch.float16, tf32=True),
}


def _check_known(what: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}")


def check_available(device: str) -> None:
    """Raises ValueError for a GPU where there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' is not available here; use 'cpu'")


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        model: A name in timm's registry.
        mode: One of `MODES`.
        device: `cpu` or `cuda`.
        dtype: One of `DTYPES`.
        batch: Images a step.
        size: Pixels along a side.
        launch: One of `LAUNCHES`.

    Raises:
        ValueError: If nothing could be measured so anywhere.
    """

    model: str
    mode: str
    device: str
    dtype: str
    batch: int
    size: int
    launch: str = "eager"

    def __post_init__(self) -> None:
        if not timm.is_model(self.model):
            raise ValueError(f"unknown model {self.model!r}; timm.list_models() names all")
        _check_known("mode", self.mode, MODES)
        _check_known("dtype", self.dtype, tuple(DTYPES))
        _check_known("device", self.device, DEVICES)
        _check_known("launch", self.launch, LAUNCHES)
        if self.launch == "graph" and self.device != "cuda":
            raise ValueError("launch 'graph' needs device 'cuda'; use 'eager'")
        if self.batch < 1 or self.size < 1:
            raise ValueError(f"batch and size must be at least 1, got {self.batch} and {self.size}")


@dataclass(frozen=True)
class Result:
    """What was measured; no figures where it failed.

    Attributes:
        setting: What was asked for.
        milliseconds: Median time of a step.
        memory_mib: The most that tensors took at once, weights and images included.
        error: Why there are no figures.
    """

    setting: Setting
    milliseconds: float = float("nan")
    memory_mib: float = float("nan")
    error: str = ""

    @property
    def images_per_second(self) -> float:
        """Images a second."""
        return 1e3 * self.setting.batch / self.milliseconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens of 16 x 16 pixels a second: the same at every size where cost grows linearly."""
        return self.images_per_second * (self.setting.size / TOKEN) ** 2
