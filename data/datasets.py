"""The data sets, and the loader over them.

A data set joins an image source and a transform, and decides what to do with an image that does not decode.
Workers return such events with the batch, and the main process logs or raises them: it writes the log, and
its errors have no worker's traceback.
"""

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from data.images import UndecodableImageError, decode_rgb
from data.samplers import SampleKey
from data.seeding import AUGMENT, REPLACE, derive_seed, seeded_rngs
from data.source import ImageSource
from data.transforms import Decode, Transform
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
    counts them, over all epochs, in the process that iterates the loader. `decode` makes what `transform`
    takes, and may draw random numbers too.
    """

    def __init__(
        self, source: ImageSource, transform: Transform, seed: int, decode: Decode = decode_rgb
    ) -> None:
        self.source = source
        self._decode = decode
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
        encoded = _read(self.source, index)
        with seeded_rngs(seed):
            image = self._transform(self._decode(encoded, self.source.name(index)))
        return Sample(image, int(self.source.labels[index]))


class EvalImages(Dataset[Sample]):
    """Images for evaluation; one that does not decode is an error, as leaving it out changes the result."""

    def __init__(self, source: ImageSource, transform: Transform, decode: Decode = decode_rgb) -> None:
        self.source = source
        self._decode = decode
        self._transform = transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        """The sample of an index; UndecodableImageError if the image cannot be read or does not decode."""
        image = self._decode(_read(self.source, index), self.source.name(index))
        return Sample(self._transform(image), int(self.source.labels[index]))


def _read(source: ImageSource, index: int) -> bytes:
    """The content of an image file; UndecodableImageError if it cannot be read."""
    try:
        return source.read(index)
    except OSError as error:
        raise UndecodableImageError(
            f"{source.name(index)}: expected an image file that can be read, got: {error.strerror}; replace "
            "or remove the file"
        ) from error


class ImageLoader(DataLoader):
    """A `DataLoader` over images that logs and counts replaced images, and raises errors as they are."""

    def __init__(self, images: TrainImages | EvalImages, **options: Any) -> None:
        super().__init__(_ReturnErrors(images), collate_fn=_collate, **options)
        self.images = images

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches of images [B, C, H, W] and labels [B].

        Raises:
            UndecodableImageError: an image does not decode, or cannot be read, and is not replaced.
            RuntimeError: a worker was killed.
        """
        with stop_signals_blocked():
            batches = super().__iter__()  # starts the workers
        try:
            for batch in batches:
                if isinstance(batch, UndecodableImageError):
                    raise batch
                for reason in filter(None, batch.replaced):  # of training images
                    self.images.undecodable += 1
                    logger.warning("replaced an image that does not decode: %s", reason)
                yield batch.image, batch.label
        except ConnectionError as error:  # of the pipe to a worker; those of reading are caught there
            raise RuntimeError("a loader worker was killed, perhaps for lack of memory") from error


class _ReturnErrors(Dataset[Any]):
    """A data set that returns its errors: `DataLoader` would add a worker's traceback to the message."""

    def __init__(self, images: TrainImages | EvalImages) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, key: Any) -> Sample | UndecodableImageError:
        try:
            return self._images[key]
        except UndecodableImageError as error:
            return error


def _collate(samples: list[Sample | UndecodableImageError]) -> Any:
    """The samples as a batch, or the first error among them."""
    errors = [sample for sample in samples if isinstance(sample, UndecodableImageError)]
    return errors[0] if errors else default_collate(samples)
