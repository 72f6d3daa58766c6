"""Batches for Lightning."""

import random
from collections.abc import Callable, Iterator
from functools import partial
from os import cpu_count
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from localmamba._signals import ignore_signals
from localmamba.data.bad_images import BadImages
from localmamba.data.examples import Examples, Source
from localmamba.data.images import UnreadableImageError, draft_side
from localmamba.data.sampling import EpochBatches
from localmamba.data.settings import Augmentation, ImageSettings, InputSpec
from localmamba.data.splits import stratified_split
from localmamba.data.transforms import (
    BatchAugmentation,
    Transform,
    eval_transform,
    normalize,
    train_transform,
)

Batch = tuple[Tensor, Tensor]

REPLACEMENTS = 100
"""Images tried in place of one that cannot be read, at most."""


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Examples through a transform: uint8 [C, H, W] and label.

    Args:
        examples: Images and labels.
        transform: Image -> tensor.
        seed: Of a random transform, which then depends on seed, epoch and image alone, in whichever
            worker it runs; None for a transform without randomness.
        min_side: As of `open_image`.
        replaces: Whether the next image that can be read stands in for one that cannot.
    """

    def __init__(
        self,
        examples: Examples,
        transform: Transform,
        seed: int | None = None,
        min_side: int | None = None,
        replaces: bool = False,
    ):
        self.examples = examples
        self.labels = examples.labels
        self.transform = transform
        self.seed = seed
        self.min_side = min_side
        self.replaces = replaces

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        epoch, position = divmod(index, len(self))
        return self._example(epoch, position, position)

    def _example(self, epoch: int, position: int, shown: int) -> tuple[Tensor, int]:
        image = self.examples.image(shown, self.min_side)
        if self.seed is not None:
            seed_generators(self.seed, epoch, position)
        return self.transform(image), int(self.labels[shown])

    def __getitems__(self, indices: list[int]) -> tuple[list[tuple[Tensor, int]], dict[str, str]]:
        """Returns the examples of a batch, and name and cause of the images that cannot be read."""
        items: list[tuple[Tensor, int]] = []
        causes: dict[str, str] = {}
        for index in indices:
            epoch, position = divmod(index, len(self))
            for step in range(min(REPLACEMENTS, len(self)) if self.replaces else 1):
                shown = (position + step) % len(self)
                try:
                    items.append(self._example(epoch, position, shown))
                except UnreadableImageError as error:
                    causes[self.examples.name(shown)] = str(error)
                else:
                    break
        return items, causes


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


def derive_seed(*numbers: int) -> int:
    """Returns a seed made of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_generators(*numbers: int) -> None:
    """Seeds Python's, NumPy's and PyTorch's global generators from several numbers."""
    seed = derive_seed(*numbers)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class ImageLoader(DataLoader[tuple[Tensor, int]]):
    """Loader of batches of `ImageFiles`, which tells the main process of images it cannot read.

    Attributes:
        report: Called with name and cause of each.
    """

    report: Callable[[dict[str, str]], None]

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for items, causes in super().__iter__():
            if causes:
                self.report(causes)
            if not items:
                raise ValueError("no image of a batch can be read")
            yield items[0], items[1]


class ImageData(LightningDataModule):
    """A data set as batches of normalized images.

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
        bad: Images that cannot be read, where the run knows some already.

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
        bad: BadImages | None = None,
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
        self.bad = bad or BadImages(settings.bad_images, settings.bad_share)
        self._batches_done = 0
        self._datasets: dict[tuple[str, bool], ImageFiles | ImageTensors] = {}

    def dataset(self, split: str, training: bool = False) -> ImageFiles | ImageTensors:
        """One split, checked, with the transform of training or evaluation; made once."""
        key = (split, training)
        if key not in self._datasets:
            examples = self._examples(split)
            transform, min_side = eval_transform(self.spec), None
            if training:
                transform = train_transform(self.spec, self.augmentation)
                if scale := self.augmentation.crop_scale:
                    min_side = draft_side(self.spec.size, scale, self.augmentation.crop_ratio)
            varies = training and self.augmentation.per_image
            if examples.in_memory and not varies:
                self._datasets[key] = ImageTensors(examples, transform)
            else:
                seed = self.seed if varies else None
                replaces = training and self.settings.bad_images == "skip"
                self._datasets[key] = ImageFiles(examples, transform, seed, min_side, replaces)
        return self._datasets[key]

    def _examples(self, split: str) -> Examples:
        """The images of a split but those that cannot be read."""
        examples = self.source.split(split)
        if self.settings.bad_images == "unchecked":
            return examples
        if split not in self.bad.left_out:
            faults = examples.faults()
            self._report(split, {examples.name(i): cause for i, cause in faults.items()})
            self.bad.left_out[split] = list(faults)
        if not self.bad.left_out[split]:
            return examples
        return examples.subset(np.delete(np.arange(len(examples)), self.bad.left_out[split]))

    def _report(self, split: str, causes: dict[str, str], needed: bool = False) -> None:
        self.bad.add(split, len(self.source.split(split)), causes, needed)

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
        rank, world_size = self._process()
        passes, size = self.settings.passes(world_size)
        batches = EpochBatches(self.parts(), size, self.seed, rank, world_size, passes)
        batches.seek(self._batches_done)
        return self.loader(self.dataset("train", training=True), batches)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """The split that is evaluated, every image once, in as many batches in each process."""
        split = self.evaluated
        dataset = self.dataset(split)
        return self.loader(dataset, self.share(np.arange(len(dataset))), split)

    def share(self, positions: np.ndarray) -> list[list[int]]:
        """This process's batches of some images, in order; every process has as many batches."""
        rank, world_size = self._process()
        batches = -(-len(positions) // (world_size * self.settings.passes(world_size)[1]))
        return [b.tolist() for b in np.array_split(positions[rank::world_size], batches)]

    def loader(
        self, dataset: ImageFiles | ImageTensors, batches: Any, split: str = "train"
    ) -> DataLoader[tuple[Tensor, int]]:
        """A loader of these batches, which are lists of positions in a split."""
        pin = torch.cuda.is_available()
        if isinstance(dataset, ImageTensors):
            return DataLoader(
                dataset, batch_sampler=batches, collate_fn=_as_is, pin_memory=pin, num_workers=0
            )
        workers = self._workers()
        loader = ImageLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=ignore_signals,
            persistent_workers=workers > 0,
            pin_memory=pin,
        )
        loader.report = partial(self._report, split, needed=not dataset.replaces)
        return loader

    def _process(self) -> tuple[int, int]:
        """Index of this process and number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _workers(self) -> int:
        workers = self.settings.workers
        return min(8, cpu_count() or 1) if workers is None else workers

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> tuple[Tensor, ...]:
        """Augments (training only) and normalizes, on the device.

        Returns:
            Images and labels; in a search with `choice_share`, those of the weights, then alpha's.
        """
        del dataloader_idx
        images, labels = batch
        if self.trainer is None or not self.trainer.training:
            return normalize(images, self.spec), labels
        rank, world_size = self._process()
        passes = self.trainer.accumulate_grad_batches
        part = (self.trainer.fit_loop.total_batch_idx + 1) % passes
        cut = rank * passes + part, world_size * passes
        if not self.choice_share:
            return self.augment(images, *cut), labels
        halves = zip(images.chunk(2), labels.chunk(2), strict=True)
        return tuple(tensor for x, y in halves for tensor in (self.augment(x, *cut), y))

    def state_dict(self) -> dict[str, Any]:
        """The position in the data and what has been left out of it, for a checkpoint."""
        assert self.trainer is not None
        return {
            "batches_done": self.trainer.fit_loop.total_batch_idx + 1,
            "passes": self.trainer.accumulate_grad_batches,
            "images": len(self.source.split("train")),
            "left_out": self.bad.left_out.get("train", []),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lets the next training loader begin at this position, with the same images.

        Images that have become unreadable since are replaced, as in a training that runs on.

        Raises:
            ValueError: If there are more or fewer training images, or passes of a step.
        """
        before, now = state_dict["images"], len(self.source.split("train"))
        if before != now:
            raise ValueError(
                f"{self.source.name} has {now} training images; it had {before} when the run was "
                "saved"
            )
        now = self.trainer.accumulate_grad_batches if self.trainer else 1
        passes = state_dict["passes"]
        if passes != now:
            raise ValueError(
                f"a step has {now} passes on a device; it had {passes} when the run was saved: "
                "devices times device_batch must stay"
            )
        self._batches_done = state_dict["batches_done"]
        if state_dict["left_out"] != self.bad.left_out.get("train", []):
            self.bad.left_out["train"] = state_dict["left_out"]
            self._datasets.pop(("train", True), None)


def _as_is(batch: Any) -> Any:
    return batch


def _collate(batch: Any) -> tuple[Any, dict[str, str]]:
    items, causes = batch
    return (default_collate(items) if items else None), causes
