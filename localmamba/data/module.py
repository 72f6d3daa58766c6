"""Batches for Lightning."""

import random
from os import cpu_count
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from localmamba.data.examples import Examples, Source, stratified_split
from localmamba.data.sampling import EpochBatches
from localmamba.data.settings import Augmentation, ImageSettings, InputSpec
from localmamba.data.transforms import (
    BatchAugmentation,
    Transform,
    eval_transform,
    normalize,
    train_transform,
)

Batch = tuple[Tensor, Tensor]


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Examples through a transform, one at a time: (uint8 [C, H, W], label).

    Args:
        examples: Images and labels.
        transform: Image -> tensor.
        seed: Of a random transform, which then depends on seed, epoch and image alone, in whichever
            worker it runs; None for a transform without randomness.
    """

    def __init__(self, examples: Examples, transform: Transform, seed: int | None = None):
        self.examples = examples
        self.labels = examples.labels
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        epoch, position = divmod(index, len(self))
        if self.seed is not None:
            seed_generators(self.seed, epoch, position)
        return self.transform(self.examples.image(position)), int(self.labels[position])


class ImageTensors(Dataset[tuple[Tensor, int]]):
    """Examples kept in memory after their transform: a batch is one lookup."""

    def __init__(self, examples: Examples, transform: Transform):
        self.images = torch.stack([transform(examples.image(i)) for i in range(len(examples))])
        self.labels = torch.from_numpy(examples.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> Batch:
        """The batch of these indices; DataLoader asks for it in this way."""
        positions = torch.tensor(indices, dtype=torch.long) % len(self)
        return self.images[positions], self.labels[positions]


def seed_generators(*numbers: int) -> None:
    """Seeds Python's, NumPy's and PyTorch's global generators from several numbers."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class ImageData(LightningDataModule):
    """A data set as batches of normalised images.

    Args:
        source: The data set.
        spec: What the model takes as input.
        settings: Batch size, workers, what to do with bad files.
        augmentation: Of the training images.
        evaluated: The split of the validation batches; by default `source.watched`.
        choice_share: Share of the training images, class by class, that a search keeps from the
            weights: each training batch then has as many of them in its second half.
        seed: Seed of the order and of augmentation by image. The images of `choice_share` follow
            `settings.split_seed`.

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
        choice_share: float = 0.0,
        seed: int = 0,
    ):
        super().__init__()
        self.source = source
        self.spec = spec
        self.settings = settings
        self.augmentation = augmentation or Augmentation()
        self.evaluated = evaluated or source.watched
        self.choice_share = choice_share
        self.seed = seed
        self.augment = BatchAugmentation(spec, self.augmentation)
        self._steps_done = 0
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
            if examples.in_memory and not varies:
                self._datasets[key] = ImageTensors(examples, transform)
            else:
                self._datasets[key] = ImageFiles(examples, transform, self.seed if varies else None)
        return self._datasets[key]

    def setup(self, stage: str | None = None) -> None:
        """Reads and checks what the stage needs, so that bad files are found before it starts."""
        if stage in (None, "fit"):
            self.dataset("train", training=True)
        self.dataset(self.evaluated)

    def parts(self) -> list[np.ndarray]:
        """Positions of the training images: of the weights and, with `choice_share`, of alpha."""
        labels = np.asarray(self.dataset("train", training=True).labels)
        if not self.choice_share:
            return [np.arange(len(labels))]
        return list(stratified_split(labels, self.choice_share, self.settings.split_seed))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Shuffled, whole batches only; a set smaller than a batch is one batch."""
        batches = EpochBatches(self.parts(), self.settings.batch_size, self.seed, *self._process())
        batches.seek(self._steps_done)
        return self.loader(self.dataset("train", training=True), batches)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """The split that is evaluated, every image once, in as many batches in each process."""
        dataset = self.dataset(self.evaluated)
        return self.loader(dataset, self.share(np.arange(len(dataset))))

    def share(self, positions: np.ndarray) -> list[list[int]]:
        """This process's batches of some images, in order; every process has as many batches."""
        rank, world_size = self._process()
        batches = -(-len(positions) // (world_size * self.settings.batch_size))
        return [b.tolist() for b in np.array_split(positions[rank::world_size], batches)]

    def loader(
        self, dataset: ImageFiles | ImageTensors, batches: Any
    ) -> DataLoader[tuple[Tensor, int]]:
        """A loader of these batches, which are lists of positions."""
        in_memory = isinstance(dataset, ImageTensors)
        workers = 0 if in_memory else self._workers()
        return DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=_as_is if in_memory else None,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def _process(self) -> tuple[int, int]:
        """Index of this process and number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _workers(self) -> int:
        workers = self.settings.workers
        return min(8, cpu_count() or 1) if workers is None else workers

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> tuple[Tensor, ...]:
        """Augments (training only) and normalises, on the device.

        Returns:
            Images and labels; in a search with `choice_share`, those of the weights, then alpha's.
        """
        del dataloader_idx
        images, labels = batch
        if self.trainer is None or not self.trainer.training:
            return normalize(images, self.spec), labels
        images = self.augment(images)
        if not self.choice_share:
            return images, labels
        halves = zip(images.chunk(2), labels.chunk(2), strict=True)
        return tuple(tensor for half in halves for tensor in half)

    def state_dict(self) -> dict[str, int]:
        """The position in the data, for a checkpoint."""
        assert self.trainer is not None
        return {"steps_done": self.trainer.fit_loop.total_batch_idx + 1}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Lets the next training loader begin at this position."""
        self._steps_done = state_dict["steps_done"]


def _as_is(batch: Any) -> Any:
    return batch
