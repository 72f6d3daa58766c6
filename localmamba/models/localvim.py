"""LocalVim (paper section 4.3, tables 1 and 2).

Source: LocalMamba, https://arxiv.org/abs/2403.09338, and github.com/hunto/LocalMamba.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import to_2tuple, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..layers import (
    AxialRotary,
    DropPath,
    LocalVimBlock,
    LocalVimMixer,
    PatchEmbed,
    RMSNorm,
    resize_table,
)
from ..layers.mixer import LOCAL
from .base import RELEASE, ScanModel, build, check_images, pretrained_cfg
from .directions import DirectionTable, resolve_directions, searched_directions
from .layouts import LOCALVIM, VIM
from .released import checkpoint_filter_fn

torch.fx.wrap("resize_table")
torch.fx.wrap("check_images")

ROTARY = {"rope.freqs_cos": "rope.cos", "rope.freqs_sin": "rope.sin"}
"""Released names of the rotary tables, and ours."""


class LocalVim(ScanModel):
    """A plain stack of blocks that scan the patches of an image along several directions.

    Takes images of any size: sides that the patch size does not divide are padded at the bottom and
    right, and position tables are resampled to the grid.

    Args:
        img_size: Image size (or (H, W)) that the position tables are for.
        patch_size: Side of a patch.
        in_chans: Channels of an image.
        num_classes: Outputs of the head; 0 for none.
        global_pool: `avg`, `token` (the class token), or `` for unpooled tokens.
        embed_dim: Width C.
        depth: Number of blocks.
        directions: Scan directions: names, a table of one row a block, or a JSON file of either.
        scattn: `channel`, `channel+spatial`, or `none`.
        class_token: Whether a class token stands in the middle of the sequence. Without one, rotary
            positions rotate the residual stream before every block (as in the release).
        merge: How directions are combined, `sum` or `mean`.
        expand: Inner channels over C.
        d_state: States per channel.
        drop_rate: Dropout before the head.
        drop_path_rate: Stochastic depth, rising linearly from 0 to this.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If an argument is not one of those allowed, or directions do not fit the depth.
    """

    layouts = {".A_b_log": VIM, "": LOCALVIM}  # noqa: RUF012

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 192,
        depth: int = 20,
        directions: DirectionTable = LOCAL,
        scattn: str | None = "channel",
        class_token: bool = False,
        merge: str = "sum",
        expand: float = 2.0,
        d_state: int = 16,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        table = resolve_directions(directions, depth)
        _check_pool(global_pool, class_token)
        feature = {"num_chs": embed_dim, "reduction": patch_size}
        features = [{**feature, "module": f"blocks.{i}"} for i in range(depth)]
        super().__init__(num_classes, in_chans, features)
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.global_pool = global_pool
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, **dd)
        self.grid = self.patch_embed.dynamic_feat_size(to_2tuple(img_size))
        tokens = self.grid[0] * self.grid[1] + int(class_token)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd)) if class_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, embed_dim, **dd))
        self.rope = AxialRotary(embed_dim, self.grid, **dd) if not class_token else None
        # A block's drop path acts on the previous block's output: one step behind timm's.
        rates = [0.0, *torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()]
        kind = (scattn, class_token, merge, expand, d_state)
        self.blocks = nn.ModuleList(
            LocalVimBlock(embed_dim, row, *kind, rate, **dd)
            for row, rate in zip(table, rates, strict=False)
        )
        self.drop_path = DropPath(drop_path_rate)
        self.norm: nn.Module = RMSNorm(embed_dim, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = _linear_head(embed_dim, num_classes, **dd)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initializes with truncated normal 0.02; output projections, Kaiming over sqrt(depth)."""
        trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, LocalVimMixer):
                trunc_normal_(module.in_proj.weight, std=0.02)
                nn.init.kaiming_uniform_(module.out_proj.weight, a=5**0.5)
                module.out_proj.weight /= len(self.blocks) ** 0.5

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:  # noqa: ARG002 - timm's interface
        """Returns timm's groups of parameters for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switches activation checkpointing of the blocks on or off."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Returns the head's linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head, keeping the pooling unless another is named."""
        if global_pool is not None:
            _check_pool(global_pool, self.cls_token is not None)
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = self.pos_embed
        self.head = _linear_head(self.embed_dim, num_classes, like.device, like.dtype)
        self.head.train(self.training)

    @torch.no_grad()
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resamples the position tables, in place, to the grid of another image size."""
        grid = self.patch_embed.dynamic_feat_size(to_2tuple(img_size))
        table = resize_table(self.pos_embed, self.grid, *grid, self.cls_token is not None)
        self.pos_embed = nn.Parameter(table.clone(), self.pos_embed.requires_grad)
        if self.rope is not None:
            self.rope.cos, self.rope.sin = self.rope(self.grid, *grid)
        self.patch_embed.set_input_size(to_2tuple(img_size))
        self.grid = grid

    @torch.jit.ignore
    def resize_released(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Resamples the position tables of a checkpoint to the grid of this model.

        Rotary tables that it lacks are computed for its grid, then resampled like the positions.
        """
        tensors = {ROTARY.get(name, name): x for name, x in tensors.items()}
        class_token = self.cls_token is not None
        table = tensors.get("pos_embed")
        if table is None or table.dim() != 3:
            return tensors
        side = math.isqrt(table.shape[1] - class_token)
        grid = (side, side) if side * side == table.shape[1] - class_token else self.grid
        tables = {"pos_embed": table}
        if self.rope is not None:
            computed = dict(zip(("rope.cos", "rope.sin"), self.rope.tables(grid), strict=True))
            tables |= {name: tensors.get(name, table) for name, table in computed.items()}
        for name, given in tables.items():
            with_token = class_token and name == "pos_embed"
            given = given.reshape(1, -1, given.shape[-1])
            if given.shape[1] == grid[0] * grid[1] + with_token:
                given = given.to(self.pos_embed.dtype)
                given = resize_table(given, grid, *self.grid, class_token=with_token)
            tensors[name] = given
        return tensors

    def embed(self, x: Tensor) -> tuple[Tensor, int, int, Tensor | None, Tensor | None]:
        """Images [B, channels, height, width] -> tokens [B, L, C], H, W, rotary cos and sin."""
        x = self.patch_embed(check_images(x, self.in_chans))
        height, width = x.shape[1], x.shape[2]
        x = x.flatten(1, 2)
        if self.cls_token is not None:
            middle = height * width // 2
            token = self.cls_token.expand(x.shape[0], -1, -1)
            x = torch.cat((x[:, :middle], token, x[:, middle:]), dim=1)
        with_token = self.cls_token is not None
        x = x + resize_table(self.pos_embed, self.grid, height, width, with_token)
        cos: Tensor | None = None
        sin: Tensor | None = None
        if self.rope is not None:
            cos, sin = self.rope(self.grid, height, width)
        return x, height, width, cos, sin

    def run_blocks(
        self, x: Tensor, take: list[int], stop: int
    ) -> tuple[Tensor, Tensor | None, list[tuple[Tensor, Tensor]], int, int]:
        """Runs the blocks before `stop`.

        Returns:
            Hidden tokens and residual stream after the last block, the pairs of both after the
            blocks in `take`, and the grid's height and width.
        """
        x, height, width, cos, sin = self.embed(x)
        residual: Tensor | None = None
        taken: list[tuple[Tensor, Tensor]] = []
        for i, block in enumerate(self.blocks):
            if i < stop:
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x, residual = checkpoint(block, x, residual, height, width, cos, sin)
                else:
                    x, residual = block(x, residual, height, width, cos, sin)
                if i in take and residual is not None:
                    taken.append((x, residual))
        return x, residual, taken, height, width

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, channels, height, width] -> normalized tokens [B, L, C].

        With a class token, L is H * W + 1 and that token stands at H * W // 2.
        """
        x, residual, _, _, _ = self.run_blocks(x, [], len(self.blocks))
        return self._final(x, residual)

    def _final(self, x: Tensor, residual: Tensor | None) -> Tensor:
        x = self.drop_path(x)
        return self.norm(x if residual is None else residual + x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, L, C] -> logits, or the input of the head's linear layer."""
        if self.global_pool == "avg":
            x = x.mean(dim=1)
        elif self.global_pool == "token":
            x = x[:, (x.shape[1] - 1) // 2]
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, channels, height, width] -> logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = True,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Returns the residual stream after chosen blocks.

        Args:
            x: Images [B, channels, height, width].
            indices: Blocks: the last n, a list, or None for all.
            norm: Whether the stream passes the final norm (the blocks that follow read the stream).
            stop_early: Whether to skip the blocks after the last chosen one.
            output_fmt: `NCHW` or `NLC`; a class token is left out of both.
            intermediates_only: Whether to return the list alone.

        Returns:
            The list of features, or (tokens of `forward_features`, list).
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be NCHW or NLC, got {output_fmt!r}")
        take, last = feature_take_indices(len(self.blocks), indices)
        stop = last + 1 if stop_early else len(self.blocks)
        x, residual, taken, height, width = self.run_blocks(x, take, stop)
        intermediates: list[Tensor] = []
        for hidden, stream in taken:
            feature = stream + hidden
            if norm:
                feature = self.norm(feature)
            feature = self.without_class_token(feature, height, width)
            if output_fmt == "NCHW":
                feature = feature.transpose(1, 2).unflatten(2, (height, width)).contiguous()
            intermediates.append(feature)
        if intermediates_only:
            return intermediates
        return self._final(x, residual), intermediates

    def without_class_token(self, x: Tensor, height: int, width: int) -> Tensor:
        """Removes the class token, if there is one: [B, L, C] -> [B, H * W, C]."""
        if self.cls_token is None:
            return x
        middle = height * width // 2
        return torch.cat((x[:, :middle], x[:, middle + 1 :]), dim=1)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the blocks after the last chosen one; returns the chosen blocks' positions."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take


def _check_pool(global_pool: str, class_token: bool) -> None:
    allowed = ("avg", "token", "") if class_token else ("avg", "")
    if global_pool not in allowed:
        raise ValueError(
            f"global_pool must be one of {', '.join(map(repr, allowed))}, got {global_pool!r}"
        )


def _linear_head(
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


def create_localvim(
    variant: str, pretrained: bool, model: Callable[..., LocalVim] = LocalVim, **kwargs: Any
) -> LocalVim:
    """Builds a registered LocalVim or Vim; its features are four blocks at equal steps, normed."""
    depth = kwargs.get("depth", 20)
    taps = tuple(depth * step // 4 - 1 for step in (1, 2, 3, 4))
    return build(
        model,
        variant,
        pretrained,
        feature_cfg={"out_indices": taps, "feature_cls": "getter", "norm": True},
        pretrained_filter_fn=checkpoint_filter_fn,
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "localvim_tiny.in1k": pretrained_cfg(RELEASE + "local_vim_tiny.ckpt"),
        "localvim_tiny_midcls.in1k": pretrained_cfg(
            RELEASE + "local_vim_tiny_middle_cls_token.ckpt"
        ),
        "localvim_small": pretrained_cfg(),
        "localvim_tiny_nosearch": pretrained_cfg(),
        "localvim_small_nosearch": pretrained_cfg(),
        "localvim_demo": pretrained_cfg(size=8, num_classes=10, crop_pct=1.0),
    }
)

DEMO: dict[str, Any] = {
    "img_size": 8,
    "patch_size": 1,
    "depth": 4,
    "d_state": 8,
    "drop_path_rate": 0.0,
}


@register_model
def localvim_tiny(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-T with searched directions: 8M parameters, 76.2 top-1 in the paper."""
    arguments = {"directions": searched_directions("localvim_tiny")}
    return create_localvim("localvim_tiny", pretrained, **{**arguments, **kwargs})


@register_model
def localvim_small(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-S with the directions searched for T: 28M parameters, 81.2 top-1 in the paper."""
    arguments = {"embed_dim": 384, "directions": searched_directions("localvim_tiny")}
    return create_localvim("localvim_small", pretrained, **{**arguments, **kwargs})


@register_model
def localvim_tiny_nosearch(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-T*, rows and 2 x 2 windows in every block: 75.8 top-1 in the paper."""
    return create_localvim("localvim_tiny_nosearch", pretrained, **{"directions": LOCAL, **kwargs})


@register_model
def localvim_small_nosearch(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-S*, rows and 2 x 2 windows in every block: 81.0 top-1 in the paper."""
    arguments = {"embed_dim": 384, "directions": LOCAL}
    return create_localvim("localvim_small_nosearch", pretrained, **{**arguments, **kwargs})


@register_model
def localvim_tiny_midcls(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-T with a class token in the middle, no rotary embedding: 77.8 top-1 (release)."""
    arguments = {
        "directions": searched_directions("localvim_tiny"),
        "class_token": True,
        "global_pool": "token",
    }
    return create_localvim("localvim_tiny_midcls", pretrained, **{**arguments, **kwargs})


@register_model
def localvim_demo(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """A LocalVim for 8 x 8 images (handwritten digits): width 32, 4 blocks, 8 states a channel."""
    arguments = {**DEMO, "embed_dim": 32, "directions": LOCAL}
    return create_localvim("localvim_demo", pretrained, **{**arguments, **kwargs})
