"""From images to batches: resize and crop on one image at a time, augmentation on batches."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import transforms

from localmamba.data.settings import Augmentation, InputSpec

Transform = Callable[[Image.Image], Tensor]

ELASTIC_GRID = 4
"""Elastic distortion is drawn on a grid of this many points a side, and is smooth in between."""


def eval_transform(spec: InputSpec) -> Transform:
    """Resize and centre crop (timm's): image -> uint8 [channels, size, size]."""
    from timm.data import create_transform

    resize = create_transform(
        spec.size, interpolation=spec.interpolation, crop_pct=spec.crop_pct, normalize=False
    )
    return transforms.Compose([_to_mode(spec.channels), resize])


def train_transform(spec: InputSpec, augmentation: Augmentation) -> Transform:
    """The part of the augmentation that works on one image (timm's), as `eval_transform`."""
    from timm.data import create_transform

    if not augmentation.per_image:
        return eval_transform(spec)
    whole = augmentation.crop_scale is None
    crop, colour, to_tensor = create_transform(
        spec.size,
        is_training=True,
        scale=(1.0, 1.0) if whole else augmentation.crop_scale,
        ratio=(1.0, 1.0) if whole else augmentation.crop_ratio,
        hflip=0.0,
        color_jitter=augmentation.color_jitter,
        auto_augment=augmentation.auto_augment,
        interpolation=spec.interpolation,
        normalize=False,
        separate=True,
    )
    # timm's policies fill with an RGB colour, so a grey image turns grey after them.
    return transforms.Compose([_to_mode(3), crop, colour, _to_mode(spec.channels), to_tensor])


def _to_mode(channels: int) -> Callable[[Image.Image], Image.Image]:
    return transforms.Lambda(_to_grey if channels == 1 else _to_rgb)


def _to_grey(image: Image.Image) -> Image.Image:
    return image.convert("L")


def _to_rgb(image: Image.Image) -> Image.Image:
    # A palette with transparency goes through RGBA, as Pillow asks.
    return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")


def normalize(images: Tensor, spec: InputSpec) -> Tensor:
    """uint8 [B, C, H, W] -> float32, mean 0 and deviation 1 as far as `spec` knows them."""
    mean = torch.tensor(spec.mean, device=images.device).view(-1, 1, 1)
    std = torch.tensor(spec.std, device=images.device).view(-1, 1, 1)
    return (images.float() / 255 - mean) / std


class BatchAugmentation:
    """The part of the augmentation that works on a batch, on its device.

    Random numbers come from torch's global generator of the device (erasing: Python's).
    """

    def __init__(self, spec: InputSpec, augmentation: Augmentation):
        self.spec = spec
        self.augmentation = augmentation
        a = augmentation
        self.moves = any((a.rotate, a.shift, a.zoom, a.shear, a.elastic))

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> float32, augmented and normalised."""
        if self.augmentation.hflip:
            flip = torch.rand(len(images), device=images.device) < self.augmentation.hflip
            images = torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
        if self.moves:
            grid = self._affine_grid(images) + self._elastic_shift(images)
            images = F.grid_sample(images.float(), grid, align_corners=False)
        images = normalize(images, self.spec)
        return self._erase(images) if self.augmentation.erasing else images

    def _affine_grid(self, images: Tensor) -> Tensor:
        """Where each pixel is read from: [B, H, W, 2], from -1 to 1."""
        a = self.augmentation

        def uniform(largest: float) -> Tensor:
            return (torch.rand(len(images), device=images.device) * 2 - 1) * largest

        angle, shear = uniform(math.radians(a.rotate)), uniform(math.radians(a.shear)).tan()
        zoom = 1 + uniform(a.zoom)
        cos, sin = angle.cos() / zoom, angle.sin() / zoom
        # Shifts are shares of the side, and the side is 2 long here.
        rows = [cos, -sin + shear * cos, uniform(2 * a.shift), sin, cos + shear * sin]
        theta = torch.stack([*rows, uniform(2 * a.shift)], dim=1).view(-1, 2, 3)
        return F.affine_grid(theta, list(images.shape), align_corners=False)

    def _elastic_shift(self, images: Tensor) -> Tensor:
        """A smooth random displacement: [B, H, W, 2]."""
        coarse = torch.randn(len(images), 2, ELASTIC_GRID, ELASTIC_GRID, device=images.device)
        fine = F.interpolate(coarse, images.shape[-2:], mode="bicubic", align_corners=True)
        return fine.permute(0, 2, 3, 1) * (2 * self.augmentation.elastic)

    def _erase(self, images: Tensor) -> Tensor:
        from timm.data.random_erasing import RandomErasing

        erase = RandomErasing(self.augmentation.erasing, mode="pixel", device=str(images.device))
        return erase(images)
