"""Which images a process sees, and in which order.

Training samplers yield (epoch, index) keys, so that the epoch reaches every worker process with the sample it
belongs to. Where they stand in an epoch is counted in images, so that another batch size or number of
processes goes on with the images that have not been seen.
"""

import copy
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from data.seeding import Stream, derive_seed

SampleKey = tuple[int, int]
"""(epoch, index in the data set)"""


class TrainSampler(Sampler[SampleKey]):
    """Shuffles the whole data set afresh for every epoch and deals it out to the processes batch by batch.

    At step k, the batches of all processes together are, in the order of the ranks, the batch that a single
    process with `world_size` times the batch size sees at step k. The images that do not fill a last global
    batch are left out; they differ from epoch to epoch.
    """

    def __init__(
        self, num_images: int, batch_size: int, rank: int, world_size: int, seed: int, start_step: int = 0
    ) -> None:
        """
        Args:
            num_images: size of the data set.
            batch_size: images per process and step.
            rank: of this process.
            world_size: number of processes.
            seed: the run's seed.
            start_step: batch to begin epoch 0 with.

        Raises:
            ValueError: the data set is smaller than one batch of all processes, or `start_step` is beyond the
                epoch.
        """
        self.num_images = num_images
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.steps_per_epoch = num_images // (batch_size * world_size)
        if not self.steps_per_epoch:
            raise ValueError(
                f"expected at least one batch of all processes, {batch_size * world_size} training images "
                "(DATA.BATCH_SIZE "
                f"{batch_size} x {world_size} processes), got {num_images}; reduce DATA.BATCH_SIZE or the "
                "number of processes"
            )
        self.set_epoch(0, start_step)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose what the next iteration yields.

        Args:
            epoch: from 0.
            start_step: batch to begin with, to go on in the middle of an epoch; with `steps_per_epoch`
                nothing is left.

        Raises:
            ValueError: `start_step` is not in the epoch.
        """
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(
                f"start_step: expected 0 to {self.steps_per_epoch}, the steps of an epoch, got {start_step}; "
                "resume with the "
                "data set, batch size and number of processes of the interrupted run"
            )
        self.go_on(epoch, [(self.world_size, start_step * self.batch_size * self.world_size)])

    def go_on(self, epoch: int, dealt: Sequence[Sequence[int]]) -> None:
        """Choose what the next iteration yields, after what was given out by any numbers of processes.

        Args:
            epoch: from 0.
            dealt: (number of processes, images given out to all of them), in this order.
        """
        self.epoch = epoch
        self.dealt = [(processes, images) for processes, images in dealt if images]
        self.start_step = sum(images for _, images in self.dealt) // (self.batch_size * self.world_size)

    @property
    def order(self) -> str:
        """What the order of the images depends on, besides the epoch."""
        return f"{type(self).__name__} over {self.num_images} images with seed {self.seed}"

    def __len__(self) -> int:
        """Number of images this process sees from the position on."""
        return self._steps_left() * self.batch_size

    def _steps_left(self) -> int:
        dealt = sum(images for _, images in self.dealt)
        return max(0, self.num_images - dealt) // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[SampleKey]:
        epoch = self.epoch
        for index in self._remaining(epoch, self.rank).flatten().tolist():
            yield epoch, index

    def batch_indices(self, epoch: int, step: int) -> list[list[int]]:
        """The images of every process in a step, as this number of processes gives them out."""
        twin = copy.copy(self)
        goes_on = epoch == self.epoch and step >= self.start_step
        twin.go_on(epoch, self.dealt if goes_on else [])
        place = step - twin.start_step
        return [twin._remaining(epoch, rank)[place].tolist() for rank in range(self.world_size)]

    def _remaining(self, epoch: int, rank: int) -> torch.Tensor:
        """A process's indices from the position on, (steps, batch size)."""
        start, steps = sum(images for _, images in self.dealt), self._steps_left()
        length = steps * self.world_size * self.batch_size
        order = self._permutation(self.num_images, epoch)[start : start + length]
        return order.view(steps, self.world_size, self.batch_size)[:, rank]

    def _permutation(self, length: int, *position: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, Stream.SHUFFLE, *position))
        return torch.randperm(length, generator=generator)


class ShardSampler(TrainSampler):
    """Shuffles, for every epoch, the shard that this process keeps in memory (`shard_of`).

    The order therefore depends on the number of processes. Every process runs the same number of full
    batches.
    """

    def _steps_left(self) -> int:
        return len(self._remaining(self.epoch, self.rank))

    def _remaining(self, epoch: int, rank: int) -> torch.Tensor:
        taken = torch.zeros(self.num_images, dtype=torch.bool)
        *earlier, (processes, images) = [*self.dealt] or [(self.world_size, 0)]
        if processes != self.world_size:  # the shards have changed: what is left is shuffled anew
            earlier, images = self.dealt, 0
        for count, given in earlier:
            orders = [self._shard_order(epoch, other, count, taken) for other in range(count)]
            for order in orders:
                taken[order[: given // count]] = True
        orders = [self._free(other, self.world_size, taken) for other in range(self.world_size)]
        start = images // self.world_size
        steps = max(0, min(map(len, orders)) - start) // self.batch_size
        order = self._shard_order(epoch, rank, self.world_size, taken)
        return order[start : start + steps * self.batch_size].view(steps, self.batch_size)

    def _free(self, rank: int, world_size: int, taken: torch.Tensor) -> torch.Tensor:
        """The indices of a shard that were not given out yet."""
        shard = torch.arange(self.num_images)[rank::world_size]
        return shard[~taken[shard]]

    def _shard_order(self, epoch: int, rank: int, world_size: int, taken: torch.Tensor) -> torch.Tensor:
        """The indices of `_free` as they are given out."""
        free = self._free(rank, world_size, taken)
        return free[self._permutation(len(free), epoch, rank)]


class EvalSampler(Sampler[int]):
    """Deals out every image exactly once, in order; processes may get different numbers of images."""

    def __init__(self, num_images: int, rank: int, world_size: int) -> None:
        """
        Args:
            num_images: size of the data set.
            rank: of this process.
            world_size: number of processes.
        """
        self._shard = shard_of(num_images, rank, world_size)

    def __len__(self) -> int:
        return len(self._shard)

    def __iter__(self) -> Iterator[int]:
        return iter(self._shard)


def shard_of(num_images: int, rank: int, world_size: int) -> range:
    """The indices that belong to a process: every `world_size`-th, from its rank on."""
    return range(rank, num_images, world_size)
