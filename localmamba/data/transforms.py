"""Image transforms: resize and crop of single images, augmentation of batches on the device."""

import math
import random
from collections.abc import Callable
from functools import lru_cache
from operator import methodcaller

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import transforms

from localmamba.data.sampling import batch_places
from localmamba.data.settings import Augmentation, InputSpec

Transform = Callable[[Image.Image], Tensor]

ELASTIC_GRID = 4
"""Control points per side of the elastic displacement field."""


def eval_transform(spec: InputSpec) -> Transform:
    """Returns timm's resize and center crop: image -> uint8 [channels, size, size]."""
    from timm.data import create_transform

    resize = create_transform(
        spec.size, interpolation=spec.interpolation, crop_pct=spec.crop_pct, normalize=False
    )
    return transforms.Compose([_to_mode(spec), resize])


def train_transform(spec: InputSpec, augmentation: Augmentation) -> Transform:
    """Returns timm's crop, color jitter and policy; output as that of `eval_transform`."""
    from timm.data import create_transform

    if not augmentation.per_image:
        return eval_transform(spec)
    whole = augmentation.crop_scale is None
    crop, color, to_tensor = create_transform(
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
    # timm's policies fill with an RGB color, so gray images are converted after them.
    to_rgb = methodcaller("convert", "RGB")
    return transforms.Compose([to_rgb, crop, color, _to_mode(spec), to_tensor])


def _to_mode(spec: InputSpec) -> Callable[[Image.Image], Image.Image]:
    return methodcaller("convert", "L" if spec.channels == 1 else "RGB")


def normalize(images: Tensor, spec: InputSpec) -> Tensor:
    """Scales [B, C, H, W] in 0..255 to float32 and applies the mean and std of `spec`."""
    mean, std = _mean_std(spec, images.device)
    return (images.float() / 255).sub_(mean).div_(std)


@lru_cache(maxsize=16)
def _mean_std(spec: InputSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and std [C, 1, 1], made once a device, since a copy to a GPU waits for its work."""
    mean, std = (torch.tensor(x, device=device).view(-1, 1, 1) for x in (spec.mean, spec.std))
    return mean, std


class BatchAugmentation:
    """Flip, affine and elastic distortion, normalization and erasing of a batch on its device.

    Every image gets its own parameters, from PyTorch's global generators. Each of several processes
    or passes draws for the images of the whole step and takes those of its own: from generators in
    the same state, an image gets the same however the step is cut.
    """

    def __init__(self, spec: InputSpec, augmentation: Augmentation):
        self.spec = spec
        self.augmentation = augmentation
        a = augmentation
        self.distorts = any((a.rotate, a.shift, a.zoom, a.shear, a.elastic))

    def __call__(self, images: Tensor, cut: int = 0, cuts: int = 1) -> Tensor:
        """Maps uint8 [B, C, H, W] to augmented and normalized float32; see `batch_places`."""
        places = torch.from_numpy(batch_places(len(images), cut, cuts))
        draw = _Draw(len(images) * cuts, places.to(images.device, non_blocking=True))
        if self.augmentation.hflip:
            flip = draw(torch.rand) < self.augmentation.hflip
            images = torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
        if self.distorts:
            grid = self._affine_grid(images, draw) + self._elastic_displacement(images, draw)
            images = F.grid_sample(images.float(), grid, align_corners=False)
        images = normalize(images, self.spec)
        if self.augmentation.erasing:
            self._erase(images, _Draw(draw.count, places))
        return images

    def _affine_grid(self, images: Tensor, draw: "_Draw") -> Tensor:
        """Samples affine maps; returns sampling positions in [-1, 1], [B, H, W, 2]."""
        a = self.augmentation

        def uniform(maximum: float) -> Tensor:
            return (draw(torch.rand) * 2 - 1) * maximum

        angle, shear = uniform(math.radians(a.rotate)), uniform(math.radians(a.shear)).tan()
        zoom = 1 + uniform(a.zoom)
        cos, sin = angle.cos() / zoom, angle.sin() / zoom
        # Shifts are fractions of the side, which is 2 units long here.
        rows = [cos, -sin + shear * cos, uniform(2 * a.shift), sin, cos + shear * sin]
        theta = torch.stack([*rows, uniform(2 * a.shift)], dim=1).view(-1, 2, 3)
        return F.affine_grid(theta, list(images.shape), align_corners=False)

    def _elastic_displacement(self, images: Tensor, draw: "_Draw") -> Tensor:
        """Samples smooth displacement fields, [B, H, W, 2]."""
        coarse = draw(torch.randn, 2, ELASTIC_GRID, ELASTIC_GRID)
        fine = F.interpolate(coarse, images.shape[-2:], mode="bicubic", align_corners=True)
        return fine.permute(0, 2, 3, 1) * (2 * self.augmentation.elastic)

    def _erase(self, images: Tensor, draw: "_Draw") -> None:
        """Erases in place; `draw` is of the CPU, so that no GPU is waited for."""
        from timm.data.random_erasing import RandomErasing

        erase = RandomErasing(1.0, mode="pixel", device=str(images.device))
        chosen = draw(torch.rand) < self.augmentation.erasing
        seeds = (draw(torch.rand) * 2**24).long()
        after = int(torch.randint(2**31, ()))
        for i in chosen.nonzero().flatten().tolist():
            # timm draws the place from Python's generator, the noise from that of the device.
            random.seed(int(seeds[i]))
            torch.manual_seed(int(seeds[i]))
            erase(images[i])
        torch.manual_seed(after)  # alike in all processes again


class _Draw:
    """Random numbers for the images of a whole step, of which those at some places are taken."""

    def __init__(self, count: int, places: Tensor):
        self.count, self.places = count, places

    def __call__(self, sampler: Callable[..., Tensor], *shape: int) -> Tensor:
        return sampler(self.count, *shape, device=self.places.device)[self.places]
