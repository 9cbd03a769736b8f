"""The data sets, and the loader over them.

A data set joins an image source and a transform, and decides what to do with an image that does not decode.
"""

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data.images import UndecodableImageError
from data.samplers import SampleKey
from data.seeding import AUGMENT, REPLACE, derive_seed, seeded_rngs
from data.source import ImageSource
from data.transforms import FileTransform
from data.workers import stop_signals_blocked

logger = logging.getLogger(__name__)

_MAX_REPLACEMENTS = 16


class Sample(NamedTuple):
    """What a data set returns for a key."""

    image: torch.Tensor  # [C, H, W]
    label: int
    replaced: str = ""  # why another image stands in for the one of the key; '' if none does


class TrainImages(Dataset[Sample]):
    """Augmented training images.

    The augmentation of a sample depends on (seed, epoch, index) alone. An image that does not decode, or
    whose file cannot be read, is replaced by another one, drawn from the same three numbers; `undecodable`
    counts them, over all epochs, in the process that iterates the loader.
    """

    def __init__(self, source: ImageSource, transform: FileTransform, seed: int) -> None:
        self.source = source
        self._transform = transform
        self._seed = seed
        self.undecodable = 0

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: SampleKey) -> Sample:
        """The sample of an (epoch, index) key.

        Raises:
            UndecodableImageError: too many images in a row do not decode, or cannot be read.
        """
        epoch, index = key
        seed = derive_seed(self._seed, AUGMENT, epoch, index)
        try:
            return self._sample(index, seed)
        except UndecodableImageError as error:
            reason = str(error)
        draw = np.random.default_rng(derive_seed(self._seed, REPLACE, epoch, index))
        for candidate in draw.integers(len(self), size=_MAX_REPLACEMENTS).tolist():
            try:
                return self._sample(candidate, seed)._replace(replaced=reason)
            except UndecodableImageError:
                continue
        raise UndecodableImageError(
            f"{self.source.name(index)}: expected an image that decodes or another to replace it, got "
            f"{_MAX_REPLACEMENTS} in a row that do not; most of the data set seems to be damaged: copy it "
            "again"
        )

    def _sample(self, index: int, seed: int) -> Sample:
        """The sample at an index of the source, augmented with a seed."""
        encoded = self.source.read(index)
        with seeded_rngs(seed):
            image = self._transform(encoded, self.source.name(index))
        return Sample(image, int(self.source.labels[index]))


class EvalImages(Dataset[Sample]):
    """Images for evaluation; one that does not decode is an error, as leaving it out changes the result."""

    def __init__(self, source: ImageSource, transform: FileTransform) -> None:
        self.source = source
        self._transform = transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        """The sample of an index; UndecodableImageError if the image cannot be read or does not decode."""
        image = self._transform(self.source.read(index), self.source.name(index))
        return Sample(image, int(self.source.labels[index]))


class ImageLoader(DataLoader):
    """A `DataLoader` that logs and counts replaced images, in the main process."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches of images [B, C, H, W] and labels [B].

        Raises:
            UndecodableImageError: an image does not decode, or cannot be read, and is not replaced.
        """
        with stop_signals_blocked():
            batches = super().__iter__()  # starts the workers
        try:
            for batch in batches:
                for reason in filter(None, batch.replaced):  # of training images
                    self.dataset.undecodable += 1
                    logger.warning("replaced an image that does not decode: %s", reason)
                yield batch.image, batch.label
        except UndecodableImageError as error:
            message = str(error).rpartition("UndecodableImageError: ")[2]  # without a worker's traceback
            raise UndecodableImageError(message.strip()) from error
