"""Lightning data module of an image data set."""

from os import cpu_count
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from localmamba.data.examples import Examples, Source
from localmamba.data.settings import Augmentation, ImageSettings, InputSpec
from localmamba.data.transforms import (
    BatchAugmentation,
    Transform,
    eval_transform,
    normalize,
    train_transform,
)

Batch = tuple[Tensor, Tensor]


class ImageFiles(Dataset):
    """Examples transformed on access: (uint8 [C, H, W], label)."""

    def __init__(self, examples: Examples, transform: Transform):
        self.examples = examples
        self.transform = transform

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.examples.image(index)), int(self.examples.labels[index])


class ImageTensors(Dataset):
    """Examples transformed once and kept in memory; a batch is one indexing operation."""

    def __init__(self, examples: Examples, transform: Transform):
        self.images = torch.stack([transform(examples.image(i)) for i in range(len(examples))])
        self.labels = torch.from_numpy(examples.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> Batch:
        """Returns a batch; called by DataLoader instead of `__getitem__` per index."""
        return self.images[indices], self.labels[indices]


class ImageData(LightningDataModule):
    """Batches of normalised images.

    Args:
        source: The data set.
        spec: Input of the model.
        settings: Batch size, workers, handling of bad files.
        augmentation: Augmentation of the training images; none by default.
        evaluated: Split of the validation batches; by default `source.watched`.

    Raises:
        ValueError: In `setup`, if image files cannot be read.
    """

    def __init__(
        self,
        source: Source,
        spec: InputSpec,
        settings: ImageSettings,
        augmentation: Augmentation | None = None,
        evaluated: str | None = None,
    ):
        super().__init__()
        self.source = source
        self.spec = spec
        self.settings = settings
        self.augmentation = augmentation or Augmentation()
        self.evaluated = evaluated or source.watched
        self.augment = BatchAugmentation(spec, self.augmentation)
        self._datasets: dict[tuple[str, bool], ImageFiles | ImageTensors] = {}

    def dataset(self, split: str, training: bool = False) -> ImageFiles | ImageTensors:
        """Returns a checked split with the transform of training or evaluation; cached."""
        key = (split, training)
        if key not in self._datasets:
            examples = self.source.split(split).checked(self.settings.bad_images)
            transform = eval_transform(self.spec)
            if training:
                transform = train_transform(self.spec, self.augmentation)
            random = training and self.augmentation.per_image
            kind = ImageTensors if examples.in_memory and not random else ImageFiles
            self._datasets[key] = kind(examples, transform)
        return self._datasets[key]

    def setup(self, stage: str | None = None) -> None:
        """Loads and checks the splits of a stage, so that bad files are found before it starts."""
        if stage in (None, "fit"):
            self.dataset("train", training=True)
        self.dataset(self.evaluated)

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches without the incomplete last one; a set below one batch is one batch."""
        return self.loader("train", training=True)

    def val_dataloader(self) -> DataLoader:
        """Batches of the evaluated split, in order."""
        return self.loader(self.evaluated)

    def loader(self, split: str, training: bool = False) -> DataLoader:
        """Batches of a split, in order unless `training`."""
        dataset = self.dataset(split, training)
        in_memory = isinstance(dataset, ImageTensors)
        default = min(8, cpu_count() or 1)
        chosen = default if self.settings.workers is None else self.settings.workers
        workers = 0 if in_memory else chosen
        return DataLoader(
            dataset,
            batch_size=min(self.settings.batch_size, len(dataset)),
            shuffle=training,
            drop_last=training,
            num_workers=workers,
            collate_fn=_identity if in_memory else None,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augments (in training only) and normalises on the device."""
        del dataloader_idx
        images, labels = batch
        training = self.trainer is not None and self.trainer.training
        return (self.augment(images) if training else normalize(images, self.spec)), labels


def _identity(batch: Any) -> Any:
    return batch
