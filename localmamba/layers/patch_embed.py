"""Patches of an image as tokens, by one matrix product."""

from collections.abc import Callable

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

torch.fx.wrap("cut_patches")


def cut_patches(x: Tensor, height: int, width: int) -> Tensor:
    """The pixels of each patch side by side, in the order of a convolution's weight.

    What the patches do not divide is padded with zeros at the bottom and right.

    Args:
        x: Images [B, channels, H, W].
        height: Rows of a patch.
        width: Columns of a patch.

    Returns:
        [B, ceil(H / height), ceil(W / width), channels * height * width].
    """
    bottom = (height - x.shape[2] % height) % height
    right = (width - x.shape[3] % width) % width
    if bottom + right > 0:  # padding by nothing would be a copy
        x = F.pad(x, (0, right, 0, bottom))
    x = x.unflatten(3, (-1, width)).unflatten(2, (-1, height))
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3)


class PatchEmbed(timm.layers.PatchEmbed):
    """timm's patch embedding for images of any size, channels last.

    A convolution of patches that do not overlap is a matrix product. It writes channels last, as
    the blocks read them; what the convolution writes would have to be turned round.

    Args:
        img_size: Image size (or (H, W)) that the grid's size is for; None for none.
        patch_size: Side of a patch.
        in_chans: Channels of an image.
        embed_dim: Channels C of a token.
        norm_layer: Makes the norm of the tokens from C; None for no norm.
        device: Where the parameters live.
        dtype: Of the parameters.
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
        patches = cut_patches(x, self.patch_size[0], self.patch_size[1])
        return self.norm(F.linear(patches, self.proj.weight.flatten(1), self.proj.bias))
