"""Settings of a training: the optimiser's recipe, and the hardware it runs on."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal


@dataclass(frozen=True)
class TrainingSettings:
    """How weights are trained: AdamW, linear warm-up, then a cosine down to the smallest rate.

    Attributes:
        epochs: Passes over the training images.
        lr: Largest learning rate.
        warmup_epochs: Epochs of linear warm-up.
        warmup_lr: Learning rate at the first step.
        min_lr: Learning rate at the last step.
        weight_decay: Of AdamW; biases, norms and what the model names (A, D, positions) have none.
        betas: Of AdamW.
        label_smoothing: Share of the target that is spread over all classes.
        clip_grad: Largest norm of the gradient; unlimited if not given.
        drop_path: Stochastic depth; the model's own if not given.
        ema: Decay of the running average of the weights that is evaluated and kept; 0 for none.
    """

    epochs: int = 100
    lr: float = 1e-3
    warmup_epochs: float = 5
    warmup_lr: float = 1e-7
    min_lr: float = 1e-6
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    label_smoothing: float = 0.1
    clip_grad: float | None = None
    drop_path: float | None = None
    ema: float = 0.0

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"warmup_epochs must be at least 0 and below epochs ({self.epochs}), got "
                f"{self.warmup_epochs}"
            )
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")
        for name in ("warmup_lr", "min_lr"):
            if not 0 <= getattr(self, name) <= self.lr:
                raise ValueError(f"{name} must be 0 to lr ({self.lr}), got {getattr(self, name)}")
        for name in ("label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1")


@dataclass(frozen=True)
class Hardware:
    """Where and with which numbers a model runs.

    Attributes:
        device: `auto` takes a GPU if there is one.
        devices: How many GPUs, or processes on a CPU.
        precision: 32 bits, or autocast to a half type.
        threads: CPU threads; PyTorch's choice if not given.
        deterministic: Whether a GPU may use only kernels that repeat themselves bit for bit; a CPU
            always does.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = 1
    precision: Literal["32", "bf16-mixed", "16-mixed"] = "32"
    threads: int | None = None
    deterministic: bool = False

    def __post_init__(self) -> None:
        if self.devices < 1:
            raise ValueError(f"devices must be at least 1, got {self.devices}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")


def split_groups(config: Mapping[str, Any], groups: Mapping[str, type]) -> dict[str, Any]:
    """A flat table of settings, as recipes and config.yaml have it, with its groups made of it.

    Args:
        config: Settings by name; lists stand for tuples.
        groups: Dataclasses by the name of a group; each takes the settings that it has.
    """
    rest = dict(config)
    made = {}
    for name, kind in groups.items():
        values = {f.name: rest.pop(f.name) for f in fields(kind) if f.name in rest}
        made[name] = kind(
            **{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        )
    return rest | made


def join_groups(job: Any, groups: Mapping[str, type]) -> dict[str, Any]:
    """The inverse of `split_groups`, for a dataclass that holds the groups."""
    own = {key: value for key, value in asdict(job).items() if key not in groups}
    return own | {k: v for name in groups for k, v in asdict(getattr(job, name)).items()}
