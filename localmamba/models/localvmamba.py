"""LocalVMamba (paper section 4.3, tables 1 and 2).

Source: LocalMamba, https://arxiv.org/abs/2403.09338, and github.com/hunto/LocalMamba.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..layers import DropPath, LayerNorm, LocalVMambaBlock, PatchEmbed, PatchMerging
from ..layers.mixer import LOCAL
from .base import RELEASE, ScanModel, build, check_images, pretrained_cfg
from .directions import DirectionTable, resolve_directions, searched_directions
from .layouts import LOCALVMAMBA, VMAMBA
from .released import checkpoint_filter_fn

torch.fx.wrap("check_images")


class Stage(nn.Module):
    """Patch merging (from the second stage on), then blocks. Channels last.

    Args:
        in_dim: Channels of the input.
        dim: Channels of the stage.
        downsample: Whether it begins with patch merging.
        blocks: Blocks of the stage.
        drop_path: Rate at which the last block's output is dropped, by image.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
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


class LocalVMamba(ScanModel):
    """Four stages of blocks that scan a map of patches along several directions.

    Takes images of any size: sides that the patch size does not divide are padded at the bottom and
    right, and so are odd sides between stages.

    Args:
        img_size: Unused but for its shape check: no parameter depends on the image size.
        patch_size: Side of a patch.
        in_chans: Channels of an image.
        num_classes: Outputs of the head; 0 for none.
        global_pool: timm's pooling names, `avg` or `` for the unpooled map [B, H, W, C].
        embed_dims: Width per stage.
        depths: Number of blocks per stage.
        directions: Scan directions: names, a table of one row a block (stages one after another),
            or a JSON file of either.
        scattn: `channel`, `channel+spatial`, or `none`.
        expand: Inner channels over the width.
        d_state: States per channel.
        drop_rate: Dropout before the head.
        drop_path_rate: Stochastic depth, rising linearly from 0 to this.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If an argument is not one of those allowed, or directions do not fit the depths.
    """

    layouts = {".downsample.1.": VMAMBA, "": LOCALVMAMBA}  # noqa: RUF012
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
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if len(embed_dims) != len(depths):
            raise ValueError(f"{len(embed_dims)} widths for {len(depths)} stages")
        table = iter(resolve_directions(directions, sum(depths)))
        features = [
            {"num_chs": dim, "reduction": patch_size * 2**i, "module": f"stages.{i}"}
            for i, dim in enumerate(embed_dims)
        ]
        super().__init__(num_classes, in_chans, features)
        self.global_pool = global_pool
        self.drop_rate = drop_rate
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.patch_embed = PatchEmbed(
            img_size, patch_size, in_chans, embed_dims[0], norm_layer=LayerNorm, **dd
        )
        drops = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        stages = []
        for i, (dim, depth) in enumerate(zip(embed_dims, depths, strict=True)):
            # A block's drop path acts on the previous block's output, the stage's on the last one.
            *rates, last = [0.0, *(next(drops) for _ in range(depth))]
            blocks = [
                LocalVMambaBlock(dim, next(table), scattn, expand, d_state, rate, **dd)
                for rate in rates
            ]
            stages.append(Stage(embed_dims[max(i - 1, 0)], dim, i > 0, blocks, last, **dd))
        self.stages = nn.Sequential(*stages)
        self.norm: nn.Module = LayerNorm(self.num_features, **dd)
        self.head = self._make_head(like=self.patch_embed.proj.weight)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initializes linear weights with truncated normal 0.02, biases with 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns timm's groups of parameters for layer-wise learning rates."""
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
        """Switches activation checkpointing of the blocks on or off."""
        for stage in self.stages.children():
            if isinstance(stage, Stage):
                stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Returns the head's linear layer."""
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
        """Images [B, channels, height, width] -> normalized map of the last stage [B, H, W, C]."""
        return self.norm(self.stages(self._embed(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map [B, H, W, C] -> logits, or the input of the head's linear layer."""
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
        """Returns the outputs of chosen stages.

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
        x, taken = self.run_stages(x, take, stop)
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

    def run_stages(self, x: Tensor, take: list[int], stop: int) -> tuple[Tensor, list[Tensor]]:
        """Runs the stages before `stop`; returns the last map, and those after stages in `take`."""
        x = self._embed(x)
        taken: list[Tensor] = []
        for i, stage in enumerate(self.stages):
            if i < stop:
                x = stage(x)
                if i in take:
                    taken.append(x)
        return x, taken

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the stages after the last chosen one; returns the chosen stages' positions."""
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


def create_localvmamba(
    variant: str, pretrained: bool, model: Callable[..., LocalVMamba] = LocalVMamba, **kwargs: Any
) -> LocalVMamba:
    """Builds a registered LocalVMamba or VMamba; its features are the outputs of the stages."""
    stages = len(kwargs.get("depths", (0,) * 4))
    return build(
        model,
        variant,
        pretrained,
        feature_cfg={"out_indices": tuple(range(stages)), "feature_cls": "getter"},
        pretrained_filter_fn=checkpoint_filter_fn,
        **kwargs,
    )


HEAD: dict[str, Any] = {"classifier": "head.fc", "pool_size": (7, 7)}
DEMO_HEAD: dict[str, Any] = {
    "size": 32,
    "num_classes": 10,
    "crop_pct": 1.0,
    "classifier": "head.fc",
    "pool_size": (4, 4),
}

default_cfgs = generate_default_cfgs(
    {
        "localvmamba_tiny": pretrained_cfg(**HEAD),
        "localvmamba_small.in1k": pretrained_cfg(RELEASE + "local_vssm_small.ckpt", **HEAD),
        "localvmamba_demo": pretrained_cfg(**DEMO_HEAD),
    }
)

SMALL = (2, 2, 27, 2)
DEMO: dict[str, Any] = {"patch_size": 2, "depths": (1, 1, 2), "drop_path_rate": 0.0}


@register_model
def localvmamba_tiny(pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    """LocalVMamba-T with searched directions: 26M parameters, 82.7 top-1 in the paper."""
    arguments = {"directions": searched_directions("localvmamba_tiny")}
    return create_localvmamba("localvmamba_tiny", pretrained, **{**arguments, **kwargs})


@register_model
def localvmamba_small(pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    """LocalVMamba-S with searched directions: 50M parameters, 83.7 top-1 in the paper."""
    arguments = {"depths": SMALL, "directions": searched_directions("localvmamba_small")}
    return create_localvmamba("localvmamba_small", pretrained, **{**arguments, **kwargs})


@register_model
def localvmamba_demo(pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    """A LocalVMamba for 32 x 32 images: three stages of widths 32, 64, 128."""
    arguments = {**DEMO, "embed_dims": (32, 64, 128), "directions": LOCAL}
    return create_localvmamba("localvmamba_demo", pretrained, **{**arguments, **kwargs})
