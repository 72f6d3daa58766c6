"""Trains a model on digits in half precision and compares its gradients with float32.

    python benchmarks/half_precision.py [--model localvmamba_tiny] [--dtype bfloat16] [--seed 0]

Uses a large learning rate without warm-up; tests/cuda/test_cuda_training.py runs the same steps.
Prints the mean loss of every 20 steps and, before the steps of `--compare`, the relative error of
half-precision features and gradients against float32 at the current weights (norm of the
difference over norm; median over parameters), the error due to rounding the weights alone, and the
largest output of a scan.
"""

import argparse
import copy
from collections.abc import Iterator, Sequence

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import localmamba  # noqa: F401 - registers the models
from localmamba.layers.s6 import S6Branches

SIZE, BATCH, LEARNING_RATE, WINDOW = 64, 32, 3e-3, 20
"""The learning rate is six times that of these models' recipes."""
FLOAT16_SCALE = 2.0**10
"""Loss scale when comparing gradients, which would underflow without it."""


class Digits:
    """Handwritten digits, 8 x 8, resized to 9/8 of SIZE for random crops."""

    def __init__(self, seed: int, device: str) -> None:
        data = load_digits()
        images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
        large = F.interpolate(images, size=SIZE * 9 // 8, mode="bilinear")
        self.images = large.expand(-1, 3, -1, -1).to(device)
        self.labels = torch.from_numpy(data.target).to(device)
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(self.labels), (BATCH,), generator=self.generator)
        spare = self.images.shape[2] - SIZE + 1
        top, left = torch.randint(spare, (2,), generator=self.generator).tolist()
        chosen = chosen.to(self.labels.device)
        crops = self.images[chosen, :, top : top + SIZE, left : left + SIZE]
        return crops, self.labels[chosen]


def gradients(
    model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """Returns features and the gradients of all parameters, without stochastic depth."""
    model.eval().zero_grad()
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        features = model.forward_features(images)
        loss = F.cross_entropy(model.forward_head(features), labels)
    scale = FLOAT16_SCALE if dtype == torch.float16 else 1.0
    (loss * scale).backward()
    found = [x.grad / scale for x in model.parameters()]
    model.train().zero_grad()
    return features.detach().float(), found


def differences(found: tuple[Tensor, list[Tensor]], exact: tuple[Tensor, list[Tensor]]) -> str:
    """Formats the relative errors of features and gradients."""
    features = (found[0] - exact[0]).norm() / exact[0].norm()
    sizes = torch.stack([x.norm() for x in exact[1]])
    apart = torch.stack([(x - y).norm() for x, y in zip(found[1], exact[1], strict=True)])
    median = (apart / sizes.clamp_min(1e-20)).median()
    whole = apart.norm() / sizes.norm()
    return f"features {features:.4f}, gradients {whole:.3f} (median {median:.3f})"


def compare(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> None:
    """Prints the errors of half precision at the current weights."""
    largest = [0.0]

    def note(_module, _inputs, output):
        largest[0] = max(largest[0], output.abs().max().item())

    scans = [module for module in model.modules() if isinstance(module, S6Branches)]
    hooks = [scan.register_forward_hook(note) for scan in scans]
    exact = gradients(model, images, labels, torch.float32)
    for hook in hooks:
        hook.remove()
    rounded = copy.deepcopy(model)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.to(dtype).float()
    print(f"  {dtype}: {differences(gradients(model, images, labels, dtype), exact)}")
    alone = differences(gradients(rounded, images, labels, torch.float32), exact)
    print(f"  weights rounded: {alone}; largest output of a scan {largest[0]:.1e}", flush=True)


def train(
    name: str, dtype: torch.dtype, seed: int, steps: int, device: str, compared: Sequence[int] = ()
) -> Iterator[Tensor]:
    """Trains and yields the loss of every step; prints errors before the compared steps."""
    torch.manual_seed(seed)
    model = timm.create_model(name, img_size=SIZE, num_classes=10).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    digits = Digits(seed, device)
    for step in range(steps):
        images, labels = digits.batch()
        if step in compared:
            compare(model, images, labels, dtype)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        yield loss.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="localvmamba_tiny")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--compare", type=int, nargs="*", default=[], help="before these steps")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("device 'cuda' is not available here; use --device cpu")
    if not timm.is_model(options.model):
        parser.error(f"unknown model {options.model!r}; timm.list_models() names all")
    dtype, recent = getattr(torch, options.dtype), []
    losses = train(
        options.model, dtype, options.seed, options.steps, options.device, options.compare
    )
    for step, loss in enumerate(losses, 1):
        recent.append(loss)
        if step % WINDOW == 0 or step == options.steps:
            mean = torch.stack(recent).mean()
            print(f"steps {step - len(recent) + 1} to {step}: mean loss {mean:.2f}", flush=True)
            recent.clear()


if __name__ == "__main__":
    main()
