"""The data sets, and the loader that draws from them.

A data set joins an image source and a transform, and decides what to do with an image that does not decode.
What a worker finds out about an image travels with the batch, as data, and is told by the main process: its
handlers write the log, and its errors need no worker's traceback.
"""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from data.images import UndecodableImageError, decode_rgb
from data.samplers import SampleKey
from data.seeding import Stream, derive_seed, seeded_rngs
from data.source import ImageSource
from data.transforms import Decode, Transform

logger = logging.getLogger(__name__)

_MAX_REPLACEMENTS = 16


Sample = tuple[torch.Tensor, int]
"""An image (C, H, W) and its label."""


class UnreadableImageError(UndecodableImageError):
    """The bytes of an image cannot be read: the file or the disk is gone."""


class TrainImages(Dataset[Sample]):
    """Augmented training images.

    The augmentation of a sample depends on (seed, epoch, index) alone. An image that does not decode, or
    whose file cannot be read, is replaced by another one, drawn from the same three numbers, with a warning
    that names it; `undecodable` counts them, over all epochs, in the process that iterates the loader.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Transform,
        seed: int,
        decode: Decode = decode_rgb,
    ) -> None:
        """
        Args:
            source: the images.
            transform: the random training transform.
            seed: the run's seed.
            decode: makes what `transform` takes; may draw random numbers too.
        """
        self.source = source
        self._decode = decode
        self._transform = transform
        self._seed = seed
        self.undecodable = 0

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: SampleKey) -> Sample:
        """The image and label of an (epoch, index) key.

        Raises:
            UndecodableImageError: too many images in a row do not decode, or cannot be read.
        """
        sample, replaced = self.fetch(key)
        if replaced:
            self.note_replaced(replaced)
        return sample

    def note_replaced(self, reason: str) -> None:
        """Count a sample that was replaced, and say why."""
        self.undecodable += 1
        logger.warning("replaced an image that does not decode: %s", reason)

    def fetch(self, key: SampleKey) -> tuple[Sample, str]:
        """As `dataset[key]`, and why the image was replaced ('' if it was not), which is not told yet."""
        epoch, index = key
        seed = derive_seed(self._seed, Stream.AUGMENT, epoch, index)
        try:
            return self._sample(index, seed), ""
        except (UndecodableImageError, OSError) as error:
            reason = str(error)
        draw = np.random.default_rng(derive_seed(self._seed, Stream.REPLACE, epoch, index))
        for candidate in draw.integers(len(self), size=_MAX_REPLACEMENTS).tolist():
            try:
                return self._sample(candidate, seed), reason
            except (UndecodableImageError, OSError):
                continue
        raise UndecodableImageError(
            f"{self.source.name(index)}: expected an image that decodes or another to replace it, got "
            f"{_MAX_REPLACEMENTS} in a "
            "row that do not; most of the data set seems to be damaged: copy it anew"
        )

    def _sample(self, index: int, seed: int) -> Sample:
        """The image and label at an index of the source, augmented with a seed."""
        encoded, name = self.source.read(index), self.source.name(index)
        with seeded_rngs(seed):
            return self._transform(self._decode(encoded, name)), int(self.source.labels[index])


class EvalImages(Dataset[Sample]):
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

    def __getitem__(self, index: int) -> Sample:
        """The image and label of an index.

        Raises:
            OSError: the image file cannot be read.
            UndecodableImageError: the image does not decode.
        """
        image = decode_rgb(self.source.read(index), self.source.name(index))
        return self._transform(image), int(self.source.labels[index])

    def fetch(self, index: int) -> tuple[Sample, str]:
        """As `dataset[index]`; the second value is always ''."""
        return self[index], ""


@dataclass(frozen=True)
class _Fetched:
    """What a worker knows of one sample: the sample and why it was replaced, or an error."""

    sample: Sample | None = None
    replaced: str = ""
    error: UndecodableImageError | None = None


class _Fetching(Dataset[_Fetched]):
    """A data set as the workers see it: it returns its errors, which `DataLoader` would garble."""

    def __init__(self, images: TrainImages | EvalImages) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, key: Any) -> _Fetched:
        try:
            sample, replaced = self._images.fetch(key)
        except UndecodableImageError as error:
            return _Fetched(error=UndecodableImageError(_without_addresses(str(error))))
        except OSError as error:
            return _Fetched(
                error=UnreadableImageError(f"expected an image file that can be read, got {error}")
            )
        return _Fetched(sample, _without_addresses(replaced))


def _collate(fetched: list[_Fetched]) -> tuple[Any, list[str], UndecodableImageError | None]:
    """A batch, why samples in it were replaced, and the first error, with which there is no batch."""
    error = next((item.error for item in fetched if item.error is not None), None)
    replaced = [item.replaced for item in fetched if item.replaced]
    return default_collate([item.sample for item in fetched]) if error is None else None, replaced, error


class ImageLoader(DataLoader):
    """A `DataLoader` over images that tells what its workers met.

    Args:
        images: the data set.
        options: of `DataLoader`.
    """

    def __init__(self, images: TrainImages | EvalImages, **options: Any) -> None:
        super().__init__(_Fetching(images), collate_fn=_collate, **options)
        self.images = images

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches of images (B, C, H, W) and labels (B).

        Raises:
            UndecodableImageError: an image does not decode, or cannot be read, and is not replaced.
        """
        for batch, replaced, error in super().__iter__():
            for reason in replaced:
                self.images.note_replaced(reason)  # only training images are replaced
            if error is not None:
                raise error
            yield batch


def _without_addresses(message: str) -> str:
    """Pillow names the buffer it was given by its address in memory, which helps nobody."""
    return re.sub(r" <_io\.BytesIO object at 0x[0-9a-fA-F]+>", "", message)
