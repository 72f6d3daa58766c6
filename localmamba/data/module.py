"""Batches for Lightning."""

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
    """Examples through a transform, one at a time: (uint8 [C, H, W], label)."""

    def __init__(self, examples: Examples, transform: Transform):
        self.examples = examples
        self.transform = transform

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.examples.image(index)), int(self.examples.labels[index])


class ImageTensors(Dataset):
    """Examples kept in memory after their transform: a batch is one lookup."""

    def __init__(self, examples: Examples, transform: Transform):
        self.images = torch.stack([transform(examples.image(i)) for i in range(len(examples))])
        self.labels = torch.from_numpy(examples.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> Batch:
        """The batch of these indices; DataLoader asks for it in this way."""
        return self.images[indices], self.labels[indices]


class ImageData(LightningDataModule):
    """A data set as batches of normalised images.

    Args:
        source: The data set.
        spec: What the model takes as input.
        settings: Batch size, workers, what to do with bad files.
        augmentation: Of the training images.
        evaluated: The split of the validation batches; by default `source.watched`.

    Raises:
        ValueError: From `setup`, on image files that cannot be read.
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
        """One split, checked, with the transform of training or evaluation; made once."""
        key = (split, training)
        if key not in self._datasets:
            examples = self.source.split(split).checked(self.settings.bad_images)
            transform = eval_transform(self.spec)
            if training:
                transform = train_transform(self.spec, self.augmentation)
            varies = training and self.augmentation.per_image
            kind = ImageTensors if examples.in_memory and not varies else ImageFiles
            self._datasets[key] = kind(examples, transform)
        return self._datasets[key]

    def setup(self, stage: str | None = None) -> None:
        """Reads and checks what the stage needs, so that bad files are found before it starts."""
        if stage in (None, "fit"):
            self.dataset("train", training=True)
        self.dataset(self.evaluated)

    def train_dataloader(self) -> DataLoader:
        """Shuffled, whole batches only; a set smaller than a batch is one batch."""
        return self.loader("train", training=True)

    def val_dataloader(self) -> DataLoader:
        """The split that is evaluated."""
        return self.loader(self.evaluated)

    def loader(self, split: str, training: bool = False) -> DataLoader:
        """Batches of one split, in order unless `training`."""
        dataset = self.dataset(split, training)
        in_memory = isinstance(dataset, ImageTensors)
        workers = 0 if in_memory else self._workers()
        return DataLoader(
            dataset,
            batch_size=min(self.settings.batch_size, len(dataset)),
            shuffle=training,
            drop_last=training,
            num_workers=workers,
            collate_fn=_as_is if in_memory else None,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def _workers(self) -> int:
        workers = self.settings.workers
        return min(8, cpu_count() or 1) if workers is None else workers

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augments (training only) and normalises, on the device."""
        del dataloader_idx
        images, labels = batch
        training = self.trainer is not None and self.trainer.training
        return (self.augment(images) if training else normalize(images, self.spec)), labels


def _as_is(batch: Any) -> Any:
    return batch
