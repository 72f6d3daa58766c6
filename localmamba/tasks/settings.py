"""Settings of a training: optimizer, schedule, hardware, saving."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of AdamW with linear warm-up and a cosine schedule.

    Attributes:
        epochs: Passes over the training images.
        lr: Largest learning rate.
        warmup_epochs: Epochs of linear warm-up.
        warmup_lr: Learning rate of the first step.
        min_lr: Learning rate of the last step.
        weight_decay: Weight decay, except on biases, norms and the parameters that the model names
            (A, D, positions).
        layer_decay: Factor of the learning rate from each block to the one before it.
        betas: Coefficients of AdamW.
        label_smoothing: Share of the target that is spread over all classes.
        clip_grad: Largest norm of the gradient; unlimited if not given.
        drop_path: Stochastic depth; the model's own if not given.
        ema: Decay of the running average of the weights that is evaluated and kept; 0 for none. A
            search averages alpha too, and chooses from the averages.
        skip_nonfinite: Largest number of steps of a training that are skipped since their loss is
            not finite; with one more the training stops, as a search does at the first.
    """

    epochs: int = 100
    lr: float = 1e-3
    warmup_epochs: float = 5
    warmup_lr: float = 1e-7
    min_lr: float = 1e-6
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    label_smoothing: float = 0.1
    clip_grad: float | None = None
    drop_path: float | None = None
    ema: float = 0.0
    skip_nonfinite: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.epochs <= 10**6:
            raise ValueError(f"epochs must be 1 to {10**6}, got {self.epochs}")
        if self.skip_nonfinite < 0:
            raise ValueError(f"skip_nonfinite must be at least 0, got {self.skip_nonfinite}")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"warmup_epochs must be at least 0 and below epochs ({self.epochs}), got "
                f"{self.warmup_epochs}"
            )
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be above 0 and at most 1, got {self.layer_decay}")
        for name in ("warmup_lr", "min_lr"):
            if not 0 <= getattr(self, name) <= self.lr:
                raise ValueError(f"{name} must be 0 to lr ({self.lr}), got {getattr(self, name)}")
        for name in ("label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1")


@dataclass(frozen=True)
class Hardware:
    """Device and precision.

    Attributes:
        device: `auto` takes a GPU if there is one.
        devices: Number of GPUs, or of processes on a CPU; under torchrun or srun it is theirs.
        parallel: Whether each device has the whole model (ddp), or a part of every parameter,
            gradient and optimizer state (fsdp), which saves memory.
        precision: 32 bits, or autocast to a half type.
        threads: CPU threads; PyTorch's choice if not given.
        deterministic: Whether a GPU runs deterministic kernels only; a CPU always does.
        launch: Launch of a training step's kernels: from Python, through torch.compile, or as one
            CUDA graph, which spares Python's time on one GPU.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = 1
    parallel: Literal["ddp", "fsdp"] = "ddp"
    precision: Literal["32", "bf16-mixed", "16-mixed"] = "32"
    threads: int | None = None
    deterministic: bool = False
    launch: Literal["eager", "compile", "graph"] = "eager"

    def __post_init__(self) -> None:
        for name in ("devices", "threads"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 1024:
                raise ValueError(f"{name} must be 1 to 1024, got {value}")
        if self.parallel == "fsdp" and self.precision == "16-mixed":
            raise ValueError("parallel fsdp runs with precision 32 or bf16-mixed, got 16-mixed")
        if self.parallel == "fsdp" and self.launch != "eager":
            raise ValueError(f"parallel fsdp runs with launch eager, got {self.launch}")


@dataclass(frozen=True)
class Saving:
    """Saving of the state from which a run is resumed.

    Attributes:
        save_steps: Steps after which the state is saved, besides the end of each epoch.
    """

    save_steps: int = 500

    def __post_init__(self) -> None:
        if self.save_steps < 1:
            raise ValueError(f"save_steps must be at least 1, got {self.save_steps}")
