"""Patch embedding of images, and patch merging between stages (Swin's, as VMamba has it)."""

from collections.abc import Callable

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fusion import is_plain
from .norm import LayerNorm

for _name in ("pad_sides", "cut_patches", "join_neighbors"):
    torch.fx.wrap(_name)


def pad_sides(x: Tensor, dim: int, height: int, width: int) -> Tensor:
    """Pads axes `dim` and `dim + 1` with zeros, at their ends, to multiples of height and width."""
    rows = (x.shape[dim] + height - 1) // height
    columns = (x.shape[dim + 1] + width - 1) // width
    bottom, right = rows * height - x.shape[dim], columns * width - x.shape[dim + 1]
    # Padding by nothing would copy; symbolic sizes are not compared, which would specialize them.
    known = torch.jit.is_scripting() or isinstance(bottom + right, int)
    if known and bottom + right == 0:
        return x
    return F.pad(x, [0, 0] * (x.dim() - dim - 2) + [0, right, 0, bottom])


def cut_patches(x: Tensor, height: int, width: int) -> Tensor:
    """Lays the pixels of each patch side by side, in the order of a convolution's weight.

    Args:
        x: Images [B, channels, H, W].
        height: Rows of a patch; they divide H.
        width: Columns of a patch; they divide W.

    Returns:
        [B, H / height, W / width, channels * height * width].
    """
    x = x.unflatten(3, (x.shape[3] // width, width)).unflatten(2, (x.shape[2] // height, height))
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3)


def join_neighbors(x: Tensor) -> Tensor:
    """Concatenates 2 x 2 neighbors, column by column, in one copy.

    Args:
        x: [B, H, W, C]; odd sides are padded with zeros at the bottom or right.

    Returns:
        [B, ceil(H / 2), ceil(W / 2), 4C].
    """
    x = pad_sides(x, 1, 2, 2)
    x = x.unflatten(2, (x.shape[2] // 2, 2)).unflatten(1, (x.shape[1] // 2, 2))
    return x.permute(0, 1, 3, 4, 2, 5).flatten(3)


class PatchEmbed(timm.layers.PatchEmbed):
    """timm's patch embedding for images of any size, channels last.

    A convolution over patches that do not overlap is a matrix product, which writes channels last,
    as the blocks read them.

    Args:
        img_size: Image size, or (H, W), that the grid's size is for; None for none.
        patch_size: Side of a patch.
        in_chans: Channels of an image.
        embed_dim: Channels C of a token.
        norm_layer: Makes the norm of the tokens from C; None for no norm.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        norm_layer: Callable[..., nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            img_size, patch_size, in_chans, embed_dim, norm_layer, output_fmt="NHWC",
            strict_img_size=False, dynamic_img_pad=True, device=device, dtype=dtype,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, channels, H, W] -> [B, ceil(H / patch_size), ceil(W / patch_size), C]."""
        x = pad_sides(x, 2, self.patch_size[0], self.patch_size[1])
        if torch.jit.is_scripting() or self._is_plain():
            patches = cut_patches(x, self.patch_size[0], self.patch_size[1])
            x = F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)
        else:
            x = self.proj(x).permute(0, 2, 3, 1)
        return self.norm(x)

    @torch.jit.unused
    def _is_plain(self) -> bool:
        return is_plain(self.proj, nn.Conv2d)


class PatchMerging(nn.Module):
    """Joins 2 x 2 neighboring tokens: norm of the 4C channels, linear to `out_dim` without bias.

    Odd sides are padded with zeros at the bottom or right.

    Args:
        dim: Channels C.
        out_dim: Channels after the merging.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.norm = LayerNorm(4 * dim, device=device, dtype=dtype)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), out_dim]."""
        return self.reduction(self.norm(join_neighbors(x)))
