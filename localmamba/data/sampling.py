"""Order of the training images, the same again after a resume."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


def batch_places(batch_size: int, cut: int = 0, cuts: int = 1) -> np.ndarray:
    """Returns the places in the batch of a whole step that one process takes in one pass.

    Their reverse is a part of the reverse of all places, so that mixup, which mixes a batch with
    its reverse, mixes the same images however a step is cut. This needs an even `batch_size`.

    Args:
        batch_size: Images of one process in one pass.
        cut: Index of process and pass.
        cuts: Number of processes times passes.

    Returns:
        [batch_size], in 0 .. batch_size * cuts - 1.
    """
    half, odd = divmod(batch_size, 2)
    places = np.arange(batch_size * cuts)
    first, middle, last = np.split(places, [half * cuts, (half + odd) * cuts])
    first, last = first.reshape(cuts, half), last.reshape(cuts, half)
    return np.concatenate([first[cut], middle[cut : cut + odd], last[~cut]])


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
        cuts = self.world_size * self.passes
        for number in range(self.start, self.steps):
            step, part = divmod(number, self.passes)
            places = batch_places(self.batch_size, self.rank * self.passes + part, cuts)
            places += step * cuts * self.batch_size
            batch = np.concatenate([order[places] for order in orders])
            yield (batch + self.epoch * self.images).tolist()

    def set_epoch(self, epoch: int) -> None:
        """Goes to the beginning of an epoch, unless it has been started."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def seek(self, batches: int) -> None:
        """Goes to the place where so many batches of the whole training are done."""
        self.epoch, self.start = divmod(batches, self.steps)
