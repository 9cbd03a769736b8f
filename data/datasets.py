"""The data sets that the loaders draw from.

A data set joins an image source and a transform, and decides what to do with an image that does not decode.
"""

import logging

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, get_worker_info

from data.images import UndecodableImageError, decode_rgb
from data.samplers import SampleKey
from data.seeding import Stream, derive_seed, seeded_rngs
from data.source import ImageSource
from data.transforms import Transform

logger = logging.getLogger(__name__)

_MAX_REPLACEMENTS = 16


class WorkerCounter:
    """A count that worker processes add to and the main process reads.

    It lies in shared memory with one slot per process, so that nobody needs a lock, whichever way the workers
    were started.
    """

    def __init__(self, num_workers: int) -> None:
        """
        Args:
            num_workers: of the loader; 0 counts in the main process.
        """
        self._slots = torch.zeros(num_workers + 1, dtype=torch.int64).share_memory_()

    def add_one(self) -> None:
        """Count one, from the main process or a worker of a loader."""
        worker = get_worker_info()
        self._slots[0 if worker is None else worker.id + 1] += 1

    def total(self) -> int:
        """The sum over all processes of this loader so far."""
        return int(self._slots.sum())


class TrainImages(Dataset[tuple[torch.Tensor, int]]):
    """Augmented training images.

    The augmentation of a sample depends on (seed, epoch, index) alone. An image that does not decode is
    replaced by another one, drawn from the same three numbers, after a warning that names it; `undecodable`
    counts them.
    """

    def __init__(self, source: ImageSource, transform: Transform, seed: int, num_workers: int) -> None:
        """
        Args:
            source: the images.
            transform: the random training transform.
            seed: the run's seed.
            num_workers: of the loader that will read this data set.
        """
        self.source = source
        self._transform = transform
        self._seed = seed
        self._counter = WorkerCounter(num_workers)

    @property
    def undecodable(self) -> int:
        """How many samples had to be replaced so far, over all epochs and worker processes."""
        return self._counter.total()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: SampleKey) -> tuple[torch.Tensor, int]:
        """The image (C, H, W) and label of an (epoch, index) key.

        Raises:
            OSError: the image file cannot be read.
            ValueError: too many images in a row do not decode.
        """
        epoch, index = key
        image, index = self._decode_or_replace(epoch, index)
        with seeded_rngs(derive_seed(self._seed, Stream.AUGMENT, *key)):
            return self._transform(image), int(self.source.labels[index])

    def _decode_or_replace(self, epoch: int, index: int) -> tuple[Image.Image, int]:
        """The image of an index, or of its replacement, and the index it has in the source."""
        try:
            return _decode(self.source, index), index
        except UndecodableImageError as error:
            self._counter.add_one()
            logger.warning("replaced an image that does not decode: %s", error)
        draw = np.random.default_rng(derive_seed(self._seed, Stream.REPLACE, epoch, index))
        for candidate in draw.integers(len(self), size=_MAX_REPLACEMENTS).tolist():
            try:
                return _decode(self.source, candidate), candidate
            except UndecodableImageError:
                continue
        raise ValueError(
            f"{self.source.name(index)}: expected an image that decodes or another to replace it, got "
            f"{_MAX_REPLACEMENTS} in a "
            "row that do not; most of the data set seems to be damaged: copy it anew"
        )


class EvalImages(Dataset[tuple[torch.Tensor, int]]):
    """Images for evaluation; one that does not decode is an error, as leaving it out changes the result."""

    def __init__(self, source: ImageSource, transform: Transform) -> None:
        """
        Args:
            source: the images.
            transform: the evaluation transform.
        """
        self.source = source
        self._transform = transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """The image (C, H, W) and label of an index.

        Raises:
            OSError: the image file cannot be read.
            UndecodableImageError: the image does not decode.
        """
        return self._transform(_decode(self.source, index)), int(self.source.labels[index])


def _decode(source: ImageSource, index: int) -> Image.Image:
    return decode_rgb(source.read(index), source.name(index))
