"""What the model tests share: registered names, and checkpoints in the layout of the release."""

import timm
import torch
from torch import Tensor, nn

from localmamba.models.layouts import Layout, source_of

MODULES = ["localvim", "localvmamba", "vim", "vmamba", "supernet"]
NAMES = timm.list_models(module=MODULES)
DEMOS = [name for name in NAMES if "demo" in name]


def demo(name: str, **kwargs) -> nn.Module:
    """A seeded small model in evaluation mode."""
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs).eval()


def demo_image(name: str, batch: int = 2) -> Tensor:
    """An image of no convenient size: neither square nor divisible."""
    size = (9, 7) if name.startswith(("localvim", "vim")) else (37, 26)
    return torch.randn(batch, 3, *size)


def as_released(model: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """A model's weights under the names and in the shapes of a release."""
    released = {}
    for name, x in model.state_dict().items():
        source = source_of(name, x.shape, layout)
        parts = x.unbind() if len(source.names) > 1 else [x]
        for part_name, part in zip(source.names, parts, strict=True):
            released[part_name] = part.reshape(source.shape)
    return {
        name.replace("rope.", "rope.freqs_"): x[0] if name.startswith("rope.") else x
        for name, x in released.items()
    }
