"""Settings of the data: which images, how they are read, how they are augmented."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ImageSettings:
    """Images and batches.

    Attributes:
        image_size: Side of the square images the model sees; the model's own if not given.
        crop_pct: Share of the side that the centre crop keeps; the model's own if not given.
        batch_size: Images in a batch.
        workers: Processes that read image files; one a core, at most 8, if not given. Digits and
            Fashion-MNIST are held in memory and need none.
        held_out: Share of every class that is held out, for a folder that is not split.
        split_seed: Seed of that split; it does not follow `seed`, so that runs can be compared.
        bad_images: What to do with files that are no images or cut short: stop before training and
            name them, leave them out and say how many, or do not look.
        data_root: Folder in which Fashion-MNIST is found, or else put by a download.
    """

    image_size: int | None = None
    crop_pct: float | None = None
    batch_size: int = 128
    workers: int | None = None
    held_out: float = 0.2
    split_seed: int = 0
    bad_images: Literal["error", "skip", "unchecked"] = "error"
    data_root: str = "~/.cache/localmamba"

    def __post_init__(self) -> None:
        _at_least("image_size", self.image_size, 1)
        _at_least("batch_size", self.batch_size, 1)
        _at_least("workers", self.workers, 0)
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie between 0 and 1, got {self.held_out}")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must be above 0 and at most 1, got {self.crop_pct}")


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of the training images.

    The first four work on one image at a time, as timm has them; the others on a batch, on the
    device.

    Attributes:
        crop_scale: Random resized crop: smallest and largest share of the area.
        crop_ratio: Its smallest and largest aspect ratio.
        color_jitter: Strength of brightness, contrast and saturation jitter.
        auto_augment: timm's policy, such as rand-m9-mstd0.5.
        hflip: Probability of a mirror image.
        rotate: Largest rotation, degrees.
        shift: Largest shift, share of the side.
        zoom: Largest change of size, share.
        shear: Largest shear, degrees.
        elastic: Standard deviation of elastic distortion, share of the side.
        erasing: Probability that a rectangle is filled with noise.
        mixup: Alpha of mixup.
        cutmix: Alpha of CutMix; with mixup too, each batch takes one of them at random.
    """

    crop_scale: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    color_jitter: float = 0.0
    auto_augment: str | None = None
    hflip: float = 0.0
    rotate: float = 0.0
    shift: float = 0.0
    zoom: float = 0.0
    shear: float = 0.0
    elastic: float = 0.0
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        for name in ("hflip", "erasing", "shift", "zoom"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        for name in ("color_jitter", "rotate", "shear", "elastic", "mixup", "cutmix"):
            _at_least(name, getattr(self, name), 0)
        if self.crop_scale and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(
                f"crop_scale must be two shares, 0 < smallest <= largest <= 1, got "
                f"{list(self.crop_scale)}"
            )

    @property
    def per_image(self) -> bool:
        """Whether anything is asked for that works on one image at a time."""
        return bool(self.crop_scale or self.color_jitter or self.auto_augment)


@dataclass(frozen=True)
class InputSpec:
    """What a model takes as input.

    Attributes:
        size: Side of the square image.
        channels: 1 (grey) or 3 (RGB).
        mean: Of each channel, for values from 0 to 1.
        std: Of each channel.
        interpolation: Name of the filter of the resize.
        crop_pct: Share of the side that the centre crop keeps.
    """

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0


def _at_least(name: str, value: float | None, lowest: float) -> None:
    if value is not None and value < lowest:
        raise ValueError(f"{name} must be at least {lowest}, got {value}")
