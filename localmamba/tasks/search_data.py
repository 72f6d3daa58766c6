"""The images of a search: some train the weights, some may be kept to judge directions by."""

from collections.abc import Iterator
from os import cpu_count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from localmamba.data.examples import stratified_split
from localmamba.data.module import ImageData, ImageFiles
from localmamba.data.transforms import normalize

Batch = tuple[Tensor, Tensor]


class SearchData:
    """Batches whose order depends on the seed and the epoch alone, so that a search can be resumed.

    Args:
        data: A data set with a `train` split.
        holdout: Share of its training images that judge directions, class by class; 0 for none.
        seed: Of the order. Which images are held out follows `data.settings.split_seed`.
    """

    def __init__(self, data: ImageData, holdout: float, seed: int):
        self.data = data
        self.seed = seed
        dataset = data.dataset("train", training=True)
        labels = dataset.examples.labels if isinstance(dataset, ImageFiles) else dataset.labels
        labels = np.asarray(labels)
        self.training, self.held_out = np.arange(len(labels)), np.arange(0)
        if holdout:
            split_seed = data.settings.split_seed
            self.training, self.held_out = stratified_split(labels, holdout, split_seed)
        self.batch_size = min(data.settings.batch_size, len(self.training))
        self.steps = len(self.training) // self.batch_size

    def epoch(self, epoch: int) -> Iterator[tuple[Batch, Batch | None]]:
        """The batches of an epoch, each with a held-out one if there are held-out images.

        Images are uint8, as `ImageData.augment` takes them.
        """
        order = np.random.default_rng([self.seed, epoch])
        weights = self._loader(order.permutation(self.training))
        if not len(self.held_out):
            yield from ((batch, None) for batch in weights)
            return
        rounds = -(-self.steps * self.batch_size // len(self.held_out))
        stream = np.concatenate([order.permutation(self.held_out) for _ in range(rounds)])
        yield from zip(weights, self._loader(stream), strict=True)

    def judges(self, at_most: int) -> list[Batch]:
        """Held-out images without augmentation, normalised: the same ones in every call."""
        chosen = np.random.default_rng(self.seed).permutation(self.held_out)[:at_most]
        batches = np.array_split(chosen, -(-len(chosen) // self.batch_size))
        loader = self._read(batches, training=False)
        return [(normalize(images, self.data.spec), labels) for images, labels in loader]

    def _loader(self, indices: np.ndarray) -> DataLoader:
        whole = indices[: self.steps * self.batch_size]
        return self._read(np.split(whole, self.steps), training=True)

    def _read(self, batches: list[np.ndarray], training: bool) -> DataLoader:
        dataset = self.data.dataset("train", training)
        from_files = isinstance(dataset, ImageFiles)
        workers = self.data.settings.workers
        return DataLoader(
            dataset,
            batch_sampler=[batch.tolist() for batch in batches],
            num_workers=(min(8, cpu_count() or 1) if workers is None else workers)
            if from_files
            else 0,
            collate_fn=None if from_files else _as_is,
            pin_memory=torch.cuda.is_available(),
        )


def _as_is(batch: Any) -> Any:
    return batch
