"""Root-mean-square norm that computes in float32 and answers in the dtype of its weight."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Divides tokens by their root mean square, without subtracting a mean.

    Statistics have the dtype of the input (the residual stream, float32 at least), the result has
    that of the weight, so that a model cast to bfloat16 keeps an exact residual stream.

    Args:
        dim: Channels, the last axis of the input.
        eps: Added to the mean square.
        device: Where the weight lives.
        dtype: Of the weight.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        weight = self.weight
        return torch.rms_norm(x, [self.dim], weight.to(x.dtype), self.eps).to(weight.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"
