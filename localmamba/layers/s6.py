"""The parameters of a block's S6 branches, stacked over directions."""

import math
from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ..ops import s6_branches
from .precision import at_least_float32

torch.fx.wrap("s6_branches")
torch.fx.wrap("at_least_float32")

DT_RANGE = (1e-3, 1e-1)
"""Step sizes at initialization, after softplus: log-uniform between these."""

DT_FLOOR = 1e-4


class S6Branches(nn.Module):
    """K S6 branches: selective scans with parameters of their own, each along its own scan order.

    Every parameter holds all branches in one tensor, branch first.

    Args:
        num_branches: K.
        dim: Inner channels D.
        d_state: States per channel N.
        dt_rank: Rank R of the step sizes.
        conv_width: Taps W of the causal convolution along each scan order; 0 for none.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Attributes:
        x_proj: [K, R + 2N, D].
        dt_weight: [K, D, R].
        dt_bias: [K, D].
        A_log: [K, D, N], log(-A).
        D: [K, D].
        conv_weight: [K, D, W], or None.
        conv_bias: [K, D], or None.
    """

    def __init__(
        self,
        num_branches: int,
        dim: int,
        d_state: int = 16,
        dt_rank: int = 12,
        conv_width: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        k = num_branches
        self.num_branches = num_branches
        self.x_proj = nn.Parameter(torch.empty(k, dt_rank + 2 * d_state, dim, **dd))
        self.dt_weight = nn.Parameter(torch.empty(k, dim, dt_rank, **dd))
        self.dt_bias = nn.Parameter(torch.empty(k, dim, **dd))
        self.A_log = nn.Parameter(torch.empty(k, dim, d_state, **dd))
        self.D = nn.Parameter(torch.empty(k, dim, **dd))
        weight, bias = torch.empty(k, dim, conv_width, **dd), torch.empty(k, dim, **dd)
        self.conv_weight = nn.Parameter(weight) if conv_width > 0 else None
        self.conv_bias = nn.Parameter(bias) if conv_width > 0 else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Mamba's initialization: A = -(1..N), D = 1, step sizes log-uniform in `DT_RANGE`."""
        trunc_normal_(self.x_proj, std=0.02)
        nn.init.uniform_(self.dt_weight, -1, 1).mul_(self.dt_weight.shape[2] ** -0.5)
        low, high = (math.log(dt) for dt in DT_RANGE)
        dt = nn.init.uniform_(self.dt_bias, low, high).exp().clamp(min=DT_FLOOR)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        states = torch.arange(1, self.A_log.shape[2] + 1, device=self.A_log.device)
        self.A_log.copy_(states.log())
        nn.init.ones_(self.D)
        if self.conv_weight is not None and self.conv_bias is not None:
            bound = self.conv_weight.shape[2] ** -0.5
            nn.init.uniform_(self.conv_weight, -bound, bound)
            nn.init.uniform_(self.conv_bias, -bound, bound)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """Runs tokens through the branches.

        Args:
            x: Tokens in grid order, [B, L, D].
            index: Scan orders of the branches, int32 [K, P], from `ops.scan_index`.

        Returns:
            [B, K, L, D] in grid order.
        """
        # In half precision, the decay of slow states would round to 1.
        A = -torch.exp(at_least_float32(self.A_log))
        return s6_branches(
            x,
            self.x_proj,
            self.dt_weight,
            self.dt_bias,
            A,
            self.D,
            index,
            self.conv_weight,
            self.conv_bias,
        )
