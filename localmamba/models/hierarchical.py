"""LocalVMamba: the hierarchical models (paper section 4.3, tables 1 and 2), and VMamba before it.

Source: LocalMamba, https://arxiv.org/abs/2403.09338, and github.com/hunto/LocalMamba.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, trunc_normal_
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..layers import DropPath, LayerNorm, LocalVMambaBlock, PatchEmbed, PatchMerging
from .directions import LOCAL, DirectionTable, resolve_directions
from .interface import check_images, undecayed

torch.fx.wrap("check_images")


class Stage(nn.Module):
    """Patch merging (from the second stage on), then blocks. Channels last.

    Args:
        in_dim: Channels that come in.
        dim: Channels of the stage.
        downsample: Whether it begins with patch merging.
        blocks: The blocks.
        drop_path: Rate at which the last block's output is dropped, by image.
        device: Where the parameters live.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        downsample: bool,
        blocks: Sequence[nn.Module],
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.downsample = PatchMerging(in_dim, dim, **dd) if downsample else nn.Identity()
        self.blocks = nn.ModuleList(blocks)
        self.drop_path = DropPath(drop_path)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), dim], or the same H and W."""
        hidden = x = self.downsample(x)
        residual: Tensor | None = None
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                hidden, residual = checkpoint(block, hidden, residual)
            else:
                hidden, residual = block(hidden, residual)
        return x if residual is None else (residual + self.drop_path(hidden)).to(x.dtype)


class LocalVMamba(nn.Module):
    """Four stages of blocks that scan a map of patches along several directions.

    Takes images of any size: what the patch size does not divide is padded at the bottom and right,
    and so is an odd side between stages.

    Args:
        img_size: Unused but for its shape check: no parameter depends on the image size.
        patch_size: Side of a patch.
        in_chans: Channels of an image.
        num_classes: Outputs of the head; 0 for none.
        global_pool: timm's pooling names, `avg` or `` for the unpooled map [B, H, W, C].
        embed_dims: Widths of the stages.
        depths: Blocks of the stages.
        directions: Scan directions: names, a table of one row a block (stages one after another),
            or a JSON file of either.
        scattn: `channel`, `channel+spatial`, or `none`.
        expand: Inner channels over the width.
        d_state: States per channel.
        drop_rate: Dropout before the head.
        drop_path_rate: Stochastic depth, rising linearly from 0 to this.
        device: Where the parameters live.
        dtype: Of the parameters.

    Raises:
        ValueError: If an argument is not one of those allowed, or directions do not fit the depths.
    """

    output_fmt = "NHWC"

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 9, 2),
        directions: DirectionTable = LOCAL,
        scattn: str | None = "channel",
        expand: float = 2.0,
        d_state: int = 16,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if len(embed_dims) != len(depths):
            raise ValueError(f"{len(embed_dims)} widths for {len(depths)} stages")
        table = iter(resolve_directions(directions, sum(depths)))
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.drop_rate = drop_rate
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.patch_embed = PatchEmbed(
            img_size, patch_size, in_chans, embed_dims[0], norm_layer=LayerNorm, **dd
        )
        drops = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.feature_info: list[dict[str, Any]] = []
        stages = []
        for i, (dim, depth) in enumerate(zip(embed_dims, depths, strict=True)):
            # A block drops what the block before it puts out, the stage what its last one does.
            *rates, last = [0.0, *(next(drops) for _ in range(depth))]
            blocks = [
                LocalVMambaBlock(dim, next(table), scattn, expand, d_state, rate, **dd)
                for rate in rates
            ]
            stages.append(Stage(embed_dims[max(i - 1, 0)], dim, i > 0, blocks, last, **dd))
            reduction = patch_size * 2**i
            self.feature_info.append(
                {"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"}
            )
        self.stages = nn.Sequential(*stages)
        self.norm: nn.Module = LayerNorm(self.num_features, **dd)
        self.head = self._make_head(like=self.patch_embed.proj.weight)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Linear weights truncated normal 0.02, biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay must leave alone (biases are the recipe's)."""
        return undecayed(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Groups of parameters for layer-wise learning rates, see timm."""
        if coarse:
            return {"stem": r"^patch_embed", "blocks": r"^stages\.(\d+)"}
        return {
            "stem": r"^patch_embed",
            "blocks": [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether the backward pass runs blocks again instead of keeping what they compute."""
        for stage in self.stages.children():
            if isinstance(stage, Stage):
                stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The head's linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head, keeping the pooling unless another is named."""
        if global_pool is not None:
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.head = self._make_head(like=self.patch_embed.proj.weight)

    def _make_head(self, like: Tensor) -> ClassifierHead:
        head = ClassifierHead(
            self.num_features, self.num_classes, self.global_pool, self.drop_rate,
            input_fmt="NHWC", device=like.device, dtype=like.dtype,
        )  # fmt: skip
        if self.num_classes > 0:
            trunc_normal_(head.fc.weight, std=0.02)
            nn.init.zeros_(head.fc.bias)
        return head.train(self.training)

    def _embed(self, x: Tensor) -> Tensor:
        return self.patch_embed(check_images(x, self.in_chans))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, channels, height, width] -> normalised map of the last stage [B, H, W, C]."""
        return self.norm(self.stages(self._embed(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map [B, H, W, C] -> logits, or what the head's linear layer reads."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, channels, height, width] -> logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """What chosen stages put out.

        Args:
            x: Images [B, channels, height, width].
            indices: Stages: the last n, a list, or None for all.
            norm: Whether the last stage's output passes the final norm.
            stop_early: Whether to skip the stages after the last chosen one.
            output_fmt: `NCHW` or `NHWC`.
            intermediates_only: Whether to return the list alone.

        Returns:
            The list of maps, or (map of `forward_features`, list).

        Raises:
            ValueError: If `output_fmt` is another.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be NCHW or NHWC, got {output_fmt!r}")
        take, last = feature_take_indices(len(self.stages), indices)
        stop = last + 1 if stop_early else len(self.stages)
        x, taken = self._run_stages(x, take, stop)
        intermediates: list[Tensor] = []
        for i, feature in zip(take, taken):  # noqa: B905 - TorchScript knows no strict
            if norm and i == len(self.feature_info) - 1:
                feature = self.norm(feature)
            if output_fmt == "NCHW":
                feature = feature.permute(0, 3, 1, 2).contiguous()
            intermediates.append(feature)
        if intermediates_only:
            return intermediates
        return self.norm(x) if stop == len(self.feature_info) else x, intermediates

    def forward_maps(self, x: Tensor, indices: list[int]) -> list[Tensor]:
        """Images [B, channels, height, width] -> maps [B, H, W, C] of chosen stages."""
        return self._run_stages(x, indices, len(self.stages))[1]

    def _run_stages(self, x: Tensor, take: list[int], stop: int) -> tuple[Tensor, list[Tensor]]:
        x = self._embed(x)
        taken: list[Tensor] = []
        for i, stage in enumerate(self.stages):
            if i < stop:
                x = stage(x)
                if i in take:
                    taken.append(x)
        return x, taken

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drops the stages after the last chosen one; returns the chosen stages' positions."""
        take, last = feature_take_indices(len(self.stages), indices)
        shorter = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if prune_norm or shorter:
            self.norm = nn.Identity()
        if shorter:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return take
