"""Settings of image data: loading, augmentation, model input."""

from dataclasses import dataclass

from localmamba.data.bad_images import BadImagePolicy


@dataclass(frozen=True)
class ImageSettings:
    """Images and batches.

    Attributes:
        image_size: Side of the square input images; by default the model's.
        crop_pct: Fraction of the side kept by the center crop; by default the model's.
        batch_size: Images of a training step, on all devices together.
        device_batch: Images that a device takes at a time, at most; a step then adds up the
            gradients of several passes. By default all that are its share of the batch.
        workers: Number of processes that read image files; by default one per core, up to 8.
            Digits and Fashion-MNIST are held in memory and use none.
        held_out: Fraction of each class to hold out, for a folder without split folders.
        split_seed: Seed of that split; independent of `seed`, so that runs can be compared.
        bad_images: Handling of images that cannot be read: stop before training and name them
            (error), leave them out and list them in bad_images.csv (skip), or do not look for them
            beforehand (unchecked). One met in training is replaced by the next image under skip,
            and stops the run otherwise.
        bad_share: Fraction of the images of a split that skip may leave out.
        data_root: Folder of Fashion-MNIST; it is downloaded there if absent.
    """

    image_size: int | None = None
    crop_pct: float | None = None
    batch_size: int = 128
    device_batch: int | None = None
    workers: int | None = None
    held_out: float = 0.2
    split_seed: int = 0
    bad_images: BadImagePolicy = "error"
    bad_share: float = 0.1
    data_root: str = "~/.cache/localmamba"

    def __post_init__(self) -> None:
        _check_minimum("image_size", self.image_size, 1)
        _check_minimum("batch_size", self.batch_size, 1)
        _check_minimum("device_batch", self.device_batch, 1)
        if self.workers is not None and not 0 <= self.workers <= 1024:
            raise ValueError(f"workers must be 0 to 1024, got {self.workers}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be between 0 and 1, got {self.held_out}")
        if not 0 <= self.bad_share <= 1:
            raise ValueError(f"bad_share must be between 0 and 1, got {self.bad_share}")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must be above 0 and at most 1, got {self.crop_pct}")

    def passes(self, devices: int) -> tuple[int, int]:
        """Returns the passes of a training step, and the images of each on one device.

        Raises:
            ValueError: If the batch cannot be cut so.
        """
        share, rest = divmod(self.batch_size, devices)
        if rest:
            raise ValueError(
                f"batch_size {self.batch_size} is that of all {devices} devices; allowed: "
                f"multiples of {devices}"
            )
        if self.device_batch is None or share <= self.device_batch:
            return 1, share
        if share % self.device_batch:
            allowed = ", ".join(str(n) for n in range(1, share + 1) if share % n == 0)
            raise ValueError(
                f"device_batch {self.device_batch} does not divide a device's {share} images of a "
                f"step; allowed: {allowed}"
            )
        return share // self.device_batch, self.device_batch


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of the training images.

    The first four apply to single images on the CPU (timm's transforms), the others to batches on
    the training device.

    Attributes:
        crop_scale: Minimum and maximum area of the random resized crop, as fractions.
        crop_ratio: Minimum and maximum aspect ratio of the crop.
        color_jitter: Strength of brightness, contrast and saturation jitter.
        auto_augment: timm's policy, such as rand-m9-mstd0.5.
        hflip: Probability of a horizontal flip.
        rotate: Maximum rotation in degrees.
        shift: Maximum shift, as a fraction of the side.
        zoom: Maximum relative change of scale.
        shear: Maximum shear in degrees.
        elastic: Standard deviation of the elastic displacement, as a fraction of the side.
        erasing: Probability of random erasing.
        mixup: Alpha of mixup.
        cutmix: Alpha of CutMix; if mixup is on too, each batch uses one of them at random.
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
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        for name in ("color_jitter", "rotate", "shear", "elastic", "mixup", "cutmix"):
            _check_minimum(name, getattr(self, name), 0)
        if self.crop_scale and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(
                f"crop_scale must be two fractions, 0 < minimum <= maximum <= 1, got "
                f"{list(self.crop_scale)}"
            )

    @property
    def per_image(self) -> bool:
        """Whether any transform of single images is on."""
        return bool(self.crop_scale or self.color_jitter or self.auto_augment)


@dataclass(frozen=True)
class InputSpec:
    """Input of a model.

    Attributes:
        size: Side of the square image.
        channels: 1 (gray) or 3 (RGB).
        mean: Mean per channel, of values in [0, 1].
        std: Standard deviation per channel.
        interpolation: Name of the resize filter.
        crop_pct: Fraction of the side kept by the center crop.
    """

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0


def _check_minimum(name: str, value: float | None, minimum: float) -> None:
    if value is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
