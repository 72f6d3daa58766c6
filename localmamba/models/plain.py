"""LocalVim: the plain models (paper section 4.3, tables 1 and 2), and Vim, which they build on.

Source: LocalMamba, https://arxiv.org/abs/2403.09338; its release https://github.com/hunto/LocalMamba.
"""

import torch
from timm.layers import DropPath, PatchEmbed, get_device_dtype, to_2tuple, trunc_normal_
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..layers import AxialRotary, LocalVimBlock, RMSNorm, resize_table
from .directions import LOCAL, DirectionTable, resolve_directions

torch.fx.wrap("resize_table")

POOLS = ("avg", "token", "")


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
        scattn: `channel`, `channel+spatial`, or None.
        search: Whether this is a supernet: directions are candidates, weighed in every block.
        class_token: Whether a class token stands in the middle of the sequence.
        rotary: Whether rotary positions turn the residual stream before every block.
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
        search: bool = False,
        class_token: bool = False,
        rotary: bool = True,
        merge: str = "sum",
        expand: float = 2.0,
        d_state: int = 16,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        table = resolve_directions(directions, depth)
        _check_pool(global_pool, class_token)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.global_pool = global_pool
        self.grad_checkpointing = False
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{i}"}
            for i in range(depth)
        ]
        self.patch_embed = PatchEmbed(
            img_size, patch_size, in_chans, embed_dim, flatten=False, strict_img_size=False,
            dynamic_img_pad=True, **dd,
        )  # fmt: skip
        self.grid = self._grid(img_size)
        tokens = self.grid[0] * self.grid[1] + int(class_token)
        self.cls_token = None
        if class_token:
            self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, embed_dim, **dd))
        self.rope = AxialRotary(embed_dim, self.grid, **dd) if rotary else None
        # The rate of a block acts on what the block before it puts out: one step behind the usual.
        rates = [0.0, *torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()]
        self.blocks = nn.ModuleList(
            LocalVimBlock(
                embed_dim, row, scattn, search, class_token, merge, expand, d_state, rate, **dd
            )
            for row, rate in zip(table, rates, strict=False)
        )
        self.drop_path = DropPath(drop_path_rate)
        self.norm = RMSNorm(embed_dim, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.init_weights()

    def _grid(self, img_size: int | tuple[int, int]) -> tuple[int, int]:
        height, width = self.patch_embed.dynamic_feat_size(to_2tuple(img_size))
        return int(height), int(width)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Spec of the release: truncated normal 0.02; out_proj Kaiming uniform over sqrt(depth)."""
        trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)
        for block in self.blocks:
            trunc_normal_(block.mixer.in_proj.weight, std=0.02)
            nn.init.kaiming_uniform_(block.mixer.out_proj.weight, a=5**0.5)
            block.mixer.out_proj.weight /= len(self.blocks) ** 0.5
        _init_head(self.head)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay must leave alone (biases are the recipe's)."""
        names = {"pos_embed", "cls_token"}
        kept = ("A_log", "D", "dt_bias", "alpha")
        return names | {n for n, _ in self.named_parameters() if n.rsplit(".", 1)[-1] in kept}

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
            _check_pool(global_pool, self.cls_token is not None)
            self.global_pool = global_pool
        self.num_classes = num_classes
        dd = get_device_dtype(self)
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = _init_head(nn.Linear(self.embed_dim, num_classes, **dd))
        self.head.train(self.training)

    @torch.no_grad()
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resamples the position tables, in place, to the grid of another image size."""
        grid = self._grid(img_size)
        table = resize_table(self.pos_embed, self.grid, *grid, self.cls_token is not None)
        self.pos_embed = nn.Parameter(table.clone(), self.pos_embed.requires_grad)
        if self.rope is not None:
            self.rope.cos, self.rope.sin = self.rope(self.grid, *grid)
        self.patch_embed.set_input_size(to_2tuple(img_size))
        self.grid = grid

    def embed(self, x: Tensor) -> tuple[Tensor, int, int, Tensor | None, Tensor | None]:
        """Images [B, channels, height, width] -> tokens [B, L, C], H, W, rotary cos and sin."""
        x = self.patch_embed(x)
        height, width = x.shape[2], x.shape[3]
        x = x.flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            middle = height * width // 2
            token = self.cls_token.expand(x.shape[0], -1, -1)
            x = torch.cat((x[:, :middle], token, x[:, middle:]), dim=1)
        with_token = self.cls_token is not None
        x = x + resize_table(self.pos_embed, self.grid, height, width, with_token)
        cos: Tensor | None = None
        sin: Tensor | None = None
        if self.rope is not None:
            cos = resize_table(self.rope.cos, self.grid, height, width)
            sin = resize_table(self.rope.sin, self.grid, height, width)
        return x, height, width, cos, sin

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, channels, height, width] -> normalised tokens [B, L, C].

        With a class token, L is H * W + 1 and that token stands at H * W // 2.
        """
        x, height, width, cos, sin = self.embed(x)
        residual: Tensor | None = None
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, residual = checkpoint(block, x, residual, height, width, cos, sin)
            else:
                x, residual = block(x, residual, height, width, cos, sin)
        return self.norm(_add(residual, self.drop_path(x)))

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

        Raises:
            ValueError: If `output_fmt` is another.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be NCHW or NLC, got {output_fmt!r}")
        take, last = feature_take_indices(len(self.blocks), indices)
        x, height, width, cos, sin = self.embed(x)
        residual: Tensor | None = None
        intermediates: list[Tensor] = []
        blocks = self.blocks
        if stop_early and not torch.jit.is_scripting():
            blocks = blocks[: last + 1]
        for i, block in enumerate(blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, residual = checkpoint(block, x, residual, height, width, cos, sin)
            else:
                x, residual = block(x, residual, height, width, cos, sin)
            if i in take:
                stream = _add(residual, x)
                feature = self.norm(stream) if norm else stream
                if self.cls_token is not None:
                    middle = height * width // 2
                    feature = torch.cat((feature[:, :middle], feature[:, middle + 1 :]), dim=1)
                if output_fmt == "NCHW":
                    feature = feature.transpose(1, 2).unflatten(2, (height, width)).contiguous()
                intermediates.append(feature)
        if intermediates_only:
            return intermediates
        return self.norm(_add(residual, self.drop_path(x))), intermediates

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


def _add(residual: Tensor | None, hidden: Tensor) -> Tensor:
    return hidden if residual is None else residual + hidden


def _check_pool(global_pool: str, class_token: bool) -> None:
    allowed = POOLS if class_token else ("avg", "")
    if global_pool not in allowed:
        raise ValueError(
            f"global_pool must be one of {', '.join(map(repr, allowed))}, got {global_pool!r}"
        )


def _init_head(head: nn.Module) -> nn.Module:
    if isinstance(head, nn.Linear):
        trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
    return head
