"""Which images a process sees, and in which order.

Training samplers yield (epoch, index) keys, so that the epoch reaches every worker process with the sample it
belongs to. The position in an epoch is the number of samples seen by all processes, so that a run continues
with the unseen images under another batch size or number of processes.
"""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from data.seeding import SHUFFLE, derive_seed

SampleKey = tuple[int, int]
"""(epoch, index in the data set)"""


class TrainSampler(Sampler[SampleKey]):
    """Shuffles the whole data set in every epoch and splits it over the processes batch by batch.

    At step k, the batches of all processes together are, in the order of the ranks, the batch that a single
    process with `world_size` times the batch size sees at step k. The images that do not fill a last global
    batch are left out; they differ from epoch to epoch.
    """

    def __init__(self, num_images: int, batch_size: int, rank: int, world_size: int, seed: int) -> None:
        """ValueError if the data set is smaller than one batch of all processes; `batch_size` is of one."""
        self.num_images = num_images
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.steps_per_epoch = num_images // (batch_size * world_size)
        if not self.steps_per_epoch:
            raise ValueError(
                f"expected at least one batch of all processes, {batch_size * world_size} training images "
                f"(DATA.BATCH_SIZE {batch_size} x {world_size} processes), got {num_images}; reduce "
                "DATA.BATCH_SIZE or the number of processes"
            )
        self.resume_at(0, 0)

    def resume_at(self, epoch: int, samples_seen: int) -> None:
        """Set where the next iteration starts: after `samples_seen` images of all processes together."""
        self.epoch = epoch
        self.samples_seen = samples_seen

    @property
    def start_step(self) -> int:
        """Step of the epoch that the next iteration starts with."""
        return self.samples_seen // (self.batch_size * self.world_size)

    @property
    def order(self) -> str:
        """What the order of the images depends on, besides the epoch; `samples_seen` holds for one order."""
        return f"{type(self).__name__} over {self.num_images} images with seed {self.seed}"

    def __len__(self) -> int:
        """Number of images this process sees from the position on."""
        return self._batches().numel()

    def __iter__(self) -> Iterator[SampleKey]:
        epoch = self.epoch
        for index in self._batches().flatten().tolist():
            yield epoch, index

    def _batches(self) -> torch.Tensor:
        """The indices of this process from the position on, [steps, batch size]."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, SHUFFLE, self.epoch))
        order = torch.randperm(self.num_images, generator=generator)[self.samples_seen :]
        steps = len(order) // (self.batch_size * self.world_size)
        used = order[: steps * self.batch_size * self.world_size]
        return used.view(steps, self.world_size, self.batch_size)[:, self.rank]


class EvalSampler(Sampler[int]):
    """Every image exactly once, in order; processes may get different numbers of images."""

    def __init__(self, num_images: int, rank: int, world_size: int) -> None:
        self._shard = range(rank, num_images, world_size)

    def __len__(self) -> int:
        return len(self._shard)

    def __iter__(self) -> Iterator[int]:
        return iter(self._shard)
