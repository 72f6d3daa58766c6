"""What both model classes owe timm: pooling names, a head, parameters without weight decay."""

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

UNDECAYED = ("A_log", "D", "dt_bias", "alpha", "pos_embed", "cls_token")
"""Last parts of the names of parameters that weight decay must leave alone."""


def undecayed(model: nn.Module) -> set[str]:
    """Names of a model's parameters that weight decay must leave alone."""
    return {name for name, _ in model.named_parameters() if name.rsplit(".", 1)[-1] in UNDECAYED}


def check_pool(global_pool: str, class_token: bool) -> None:
    """ValueError unless a plain model can pool like that."""
    allowed = ("avg", "token", "") if class_token else ("avg", "")
    if global_pool not in allowed:
        raise ValueError(
            f"global_pool must be one of {', '.join(map(repr, allowed))}, got {global_pool!r}"
        )


def linear_head(
    dim: int,
    num_classes: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """A linear layer, truncated normal 0.02 and biases 0; the identity for 0 classes."""
    if num_classes == 0:
        return nn.Identity()
    head = nn.Linear(dim, num_classes, device=device, dtype=dtype)
    trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def check_images(x: Tensor, in_chans: int) -> Tensor:
    """The images, or ValueError if they are not [B, in_chans, height, width]."""
    if x.dim() != 4 or x.shape[1] != in_chans:
        raise ValueError(f"images must be [B, {in_chans}, height, width], got {x.shape}")
    return x
