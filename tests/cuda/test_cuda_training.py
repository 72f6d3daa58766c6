"""Training in half precision with a large learning rate stays finite wherever float32 does."""

import math
from functools import cache

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import localmamba  # noqa: F401 - registers the models

STEPS, BATCH, SIZE = 200, 32, 64
LEARNING_RATE = 3e-3
"""Six times what these models are trained with, and no warm-up: steps as large as they can be."""


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Handwritten digits, 8 x 8, enlarged so that a crop of SIZE loses an eighth of each side."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    large = F.interpolate(images, size=SIZE * 9 // 8, mode="bilinear").expand(-1, 3, -1, -1)
    return large.cuda(), torch.from_numpy(data.target).cuda()


def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Digits cropped at random, and their labels."""
    images, labels = digits()
    chosen = torch.randint(len(labels), (BATCH,), generator=generator)
    spare = images.shape[2] - SIZE + 1
    top, left = torch.randint(spare, (2,), generator=generator).tolist()
    crops = images[chosen.cuda(), :, top : top + SIZE, left : left + SIZE]
    return crops, labels[chosen.cuda()]


@cache
def losses(name: str, dtype: torch.dtype) -> list[float]:
    """The loss of every step, under autocast unless in float32."""
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=SIZE, num_classes=10).cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(STEPS):
        x, labels = batch(generator)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        found.append(loss.detach())
    return torch.stack(found).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["localvim_tiny", "localvmamba_tiny"])
def test_half_precision_stays_finite_where_float32_does(name, dtype):
    full, half = losses(name, torch.float32), losses(name, dtype)
    assert math.isfinite(sum(full[:20])), "float32 itself fails: the learning rate is too large"
    lost = [step for step in range(STEPS) if math.isfinite(full[step]) > math.isfinite(half[step])]
    assert not lost, f"first at step {lost[0]}, after losses {half[: lost[0]][-5:]}"
    # So large a rate may undo it again: docs/performance.md, training in half precision.
    windows = [sum(half[i : i + 20]) for i in range(0, STEPS, 20)]
    assert min(windows) < 0.7 * windows[0], f"it does not learn: {windows}"
