"""Order of the training images, the same again after a resume."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class EpochBatches(Sampler[list[int]]):
    """Batches of one epoch, drawn from the seed and the number of the epoch alone.

    No state of a random number generator has to be saved: a resumed training calls `seek` and gets
    the batches that it would have got. An index is `epoch * images + position`, from which a
    dataset seeds the augmentation of each image (`ImageFiles`).

    Args:
        parts: Positions in the dataset, an array for each part of a batch. Each part has
            `batch_size` images; an epoch passes over the first part once, and over the others as
            often as that takes.
        batch_size: Images of a part in a batch, at most.
        seed: Seed of the order.
        rank: Index of this process.
        world_size: Number of processes.
        passes: Batches of a process in a training step. The processes together take the next
            `world_size * passes * batch_size` images in every step: how a step is cut does not
            change which images it has.
    """

    def __init__(
        self,
        parts: Sequence[np.ndarray],
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        passes: int = 1,
    ):
        self.parts = parts
        self.images = sum(map(len, parts))
        cuts = world_size * passes
        self.batch_size = max(1, min(batch_size, len(parts[0]) // cuts))
        self.steps = max(1, len(parts[0]) // (self.batch_size * cuts)) * passes
        self.seed, self.rank, self.world_size, self.passes = seed, rank, world_size, passes
        self.epoch = self.start = 0
        self.sampler = self  # where Lightning looks for set_epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        total = self.steps * self.world_size * self.batch_size
        orders = [
            np.concatenate([generator.permutation(part) for _ in range(-(-total // len(part)))])
            for part in self.parts
        ]
        for step in range(self.start, self.steps):
            whole, part = divmod(step, self.passes)
            first = ((whole * self.world_size + self.rank) * self.passes + part) * self.batch_size
            batch = np.concatenate([order[first : first + self.batch_size] for order in orders])
            yield (batch + self.epoch * self.images).tolist()

    def set_epoch(self, epoch: int) -> None:
        """Goes to the beginning of an epoch, unless it has been started."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def seek(self, batches: int) -> None:
        """Goes to the place where so many batches of the whole training are done."""
        self.epoch, self.start = divmod(batches, self.steps)
