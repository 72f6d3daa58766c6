"""LocalVim: the plain models (paper section 4.3, tables 1 and 2), and Vim, which they build on.

Source: LocalMamba, https://arxiv.org/abs/2403.09338, and github.com/hunto/LocalMamba.
"""

from typing import Any

import torch
from timm.layers import to_2tuple, trunc_normal_
from timm.models import checkpoint
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
from .directions import LOCAL, DirectionTable, resolve_directions
from .interface import check_images, check_pool, linear_head, undecayed

torch.fx.wrap("resize_table")
torch.fx.wrap("check_images")


class LocalVim(nn.Module):
    """A plain stack of blocks that scan the patches of an image along several directions.

    Takes images of any size: what the patch size does not divide is padded at the bottom and right,
    and position tables are resampled to the grid.

    Args:
        img_size: Image size (or (H, W)) that the position tables are for.
        patch_size: Side of a patch.
        in_chans: Channels of an image.
        num_classes: Outputs of the head; 0 for none.
        global_pool: `avg`, `token` (the class token), or `` for unpooled tokens.
        embed_dim: Width C.
        depth: Blocks.
        directions: Scan directions: names, a table of one row a block, or a JSON file of either.
        scattn: `channel`, `channel+spatial`, or `none`.
        class_token: Whether a class token stands in the middle of the sequence. Without one, rotary
            positions turn the residual stream before every block (as in the release).
        merge: `sum` or `mean` of the directions.
        expand: Inner channels over C.
        d_state: States per channel.
        drop_rate: Dropout before the head.
        drop_path_rate: Stochastic depth, rising linearly from 0 to this.
        device: Where the parameters live.
        dtype: Of the parameters.

    Raises:
        ValueError: If an argument is not one of those allowed, or directions do not fit the depth.
    """

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
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        table = resolve_directions(directions, depth)
        check_pool(global_pool, class_token)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.global_pool = global_pool
        self.grad_checkpointing = False
        levels = [f"blocks.{i}" for i in range(depth)]
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": name} for name in levels
        ]
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, **dd)
        self.grid = self.patch_embed.dynamic_feat_size(to_2tuple(img_size))
        tokens = self.grid[0] * self.grid[1] + int(class_token)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd)) if class_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, embed_dim, **dd))
        self.rope = AxialRotary(embed_dim, self.grid, **dd) if not class_token else None
        # The rate of a block acts on what the block before it puts out: one step behind the usual.
        rates = [0.0, *torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()]
        kind = (scattn, class_token, merge, expand, d_state)
        self.blocks = nn.ModuleList(
            LocalVimBlock(embed_dim, row, *kind, rate, **dd)
            for row, rate in zip(table, rates, strict=False)
        )
        self.drop_path = DropPath(drop_path_rate)
        self.norm: nn.Module = RMSNorm(embed_dim, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = linear_head(embed_dim, num_classes, **dd)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Truncated normal 0.02; what joins the residual stream, Kaiming over sqrt(depth)."""
        trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, LocalVimMixer):
                trunc_normal_(module.in_proj.weight, std=0.02)
                nn.init.kaiming_uniform_(module.out_proj.weight, a=5**0.5)
                module.out_proj.weight /= len(self.blocks) ** 0.5

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay must leave alone (biases are the recipe's)."""
        return undecayed(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:  # noqa: ARG002 - timm's interface
        """Groups of parameters for layer-wise learning rates, see timm."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether the backward pass runs blocks again instead of keeping what they compute."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The head's linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head, keeping the pooling unless another is named."""
        if global_pool is not None:
            check_pool(global_pool, self.cls_token is not None)
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = self.pos_embed
        self.head = linear_head(self.embed_dim, num_classes, like.device, like.dtype)
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

    def _run_blocks(
        self, x: Tensor, take: list[int], stop: int
    ) -> tuple[Tensor, Tensor | None, list[tuple[Tensor, Tensor]], int, int]:
        """Runs the blocks before `stop`; keeps what those at `take` put out, and what it joins."""
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
        """Images [B, channels, height, width] -> normalised tokens [B, L, C].

        With a class token, L is H * W + 1 and that token stands at H * W // 2.
        """
        x, residual, _, _, _ = self._run_blocks(x, [], len(self.blocks))
        return self._final(x, residual)

    def _final(self, x: Tensor, residual: Tensor | None) -> Tensor:
        x = self.drop_path(x)
        return self.norm(x if residual is None else residual + x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, L, C] -> logits, or what the head's linear layer reads."""
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
        """The residual stream after chosen blocks.

        Args:
            x: Images [B, channels, height, width].
            indices: Blocks: the last n, a list, or None for all.
            norm: Whether the stream passes the final norm (which has no effect on what follows).
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
        x, residual, taken, height, width = self._run_blocks(x, take, stop)
        intermediates: list[Tensor] = []
        for hidden, stream in taken:
            feature = stream + hidden
            if norm:
                feature = self.norm(feature)
            feature = self._without_class_token(feature, height, width)
            if output_fmt == "NCHW":
                feature = feature.transpose(1, 2).unflatten(2, (height, width)).contiguous()
            intermediates.append(feature)
        if intermediates_only:
            return intermediates
        return self._final(x, residual), intermediates

    def forward_maps(self, x: Tensor, indices: list[int]) -> list[Tensor]:
        """What the mixers of chosen blocks put out, before it joins the residual stream.

        Images [B, channels, height, width] -> maps [B, H, W, C], a class token left out.
        """
        _, _, taken, height, width = self._run_blocks(x, indices, len(self.blocks))
        outputs: list[Tensor] = []
        for hidden, _ in taken:
            hidden = self._without_class_token(hidden, height, width)
            outputs.append(hidden.unflatten(1, (height, width)))
        return outputs

    def _without_class_token(self, x: Tensor, height: int, width: int) -> Tensor:
        if self.cls_token is None:
            return x
        middle = height * width // 2
        return torch.cat((x[:, :middle], x[:, middle + 1 :]), dim=1)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drops the blocks after the last chosen one; returns the chosen blocks' positions."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take
