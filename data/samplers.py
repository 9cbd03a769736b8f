"""Which images a process sees, and in which order.

Training samplers yield (epoch, index) keys, so that the epoch reaches every worker process with the sample it
belongs to.
"""

from collections.abc import Iterator

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
        self.epoch = epoch
        self.start_step = start_step

    def __len__(self) -> int:
        """Number of images this process sees from `start_step` on."""
        return (self.steps_per_epoch - self.start_step) * self.batch_size

    def __iter__(self) -> Iterator[SampleKey]:
        epoch = self.epoch
        for batch in self._batches(epoch)[self.start_step :]:
            for index in batch.tolist():
                yield epoch, index

    def _batches(self, epoch: int) -> torch.Tensor:
        """This process's indices for an epoch, (steps, batch size)."""
        global_batch = (self.steps_per_epoch, self.world_size, self.batch_size)
        order = self._permutation(self.num_images, epoch)[
            : self.steps_per_epoch * self.world_size * self.batch_size
        ]
        return order.view(global_batch)[:, self.rank]

    def _permutation(self, length: int, *position: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, Stream.SHUFFLE, *position))
        return torch.randperm(length, generator=generator)


class ShardSampler(TrainSampler):
    """Shuffles, for every epoch, the shard that this process keeps in memory (`shard_of`).

    The order therefore depends on the number of processes. Every process runs the same number of full
    batches.
    """

    def _batches(self, epoch: int) -> torch.Tensor:
        shard = shard_of(self.num_images, self.rank, self.world_size)
        order = self._permutation(len(shard), epoch, self.rank)[: self.steps_per_epoch * self.batch_size]
        indices = order * shard.step + shard.start
        return indices.view(self.steps_per_epoch, self.batch_size)


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
