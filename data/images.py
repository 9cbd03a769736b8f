"""From the encoded bytes of an image file to RGB: a whole PIL image by Pillow, or an array of a resized crop
by OpenCV, which is faster.

Both ignore the EXIF orientation, as the original does, unless `upright` is set. Of an animated file both take
the first frame, and of transparent ones the colours alone. OpenCV only gets the JPEG files that it decodes
like Pillow; everything else stays with Pillow, damaged files too, so that both find the same images
undecodable.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch.nn import functional

logger = logging.getLogger(__name__)

MAX_PIXELS = 2**26
"""Of an image; in RGB they take 200 MB."""
MAX_BYTES = 2**28
"""Of an image file."""
_REFUSED = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "IPTC", "FPX", "MIC"}
"""Formats of which Pillow runs programs, or reads no more than the header."""

Image.init()
_FORMATS = sorted(
    (name for name, (_, accepts) in Image.OPEN.items() if accepts and name not in _REFUSED),
    key=lambda name: name != "JPEG",  # the first to be tried
)
"""Formats that are recognised by how a file begins, whatever its name says."""
_FORMAT_OF = {
    extension: name
    for extension, name in Image.registered_extensions().items()
    if name in Image.OPEN and name not in _REFUSED
}
IMAGE_EXTENSIONS = tuple(_FORMAT_OF)
"""What Pillow can open here, such as .jpg and .png; in lower case, with the dot."""
_FULL_SCALES = (1, 255, 2**16 - 1)  # what white may be in images of floating point numbers
_REDUCTIONS = (8, 4, 2)  # denominators at which OpenCV decodes a JPEG file to a smaller image
_STRAY_MARKERS = {  # by whether a file is progressive: what no intact scan contains ...
    False: re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]"),  # ... of a file with one scan
    True: re.compile(rb"\xff[\x01-\xc3\xc5-\xcf\xd8\xd9\xdc\xde-\xfe]"),  # ... and no segment between scans
}

Box = tuple[int, int, int, int]
"""Top, left, height and width in pixels."""


class UndecodableImageError(ValueError):
    """An image cannot be read or does not decode; the message names the image."""


NAMED_ENDINGS = 9  # in the message about files that are left out


def is_image_name(name: str) -> bool:
    """Whether a file is taken for an image, by the ending of its name; hidden files are not."""
    return name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")


def log_left_out(folder: Path | str, names: Iterable[str]) -> None:
    """Say how many files of a folder, by ending, are left out since `is_image_name` refuses their names."""
    endings = Counter(Path(name).suffix or "no ending" for name in names if not name.startswith("."))
    if endings:
        counts = ", ".join(f"{count} with {ending}" for ending, count in endings.most_common(NAMED_ENDINGS))
        more = " and others" if len(endings) > NAMED_ENDINGS else ""
        logger.warning(
            f"{folder}: {endings.total()} files are not taken for images and left out: {counts}{more}"
        )


def decode_rgb(encoded: bytes, name: str, upright: bool = False) -> Image.Image:
    """Decode an image file to RGB with Pillow.

    Gray of more than 8 bits is scaled to 8 bits; an alpha channel is dropped.

    Args:
        encoded: the content of the image file.
        name: path of the image, for the error.
        upright: follow the EXIF orientation.

    Raises:
        UndecodableImageError: the bytes are empty, truncated or not an image.
    """
    return EncodedImage(encoded, name, upright).decode()


class EncodedImage:
    """An image file of which only the header was read."""

    def __init__(self, encoded: bytes, name: str, upright: bool = False) -> None:
        """As `decode_rgb`; UndecodableImageError if it does not begin like an image, or is too large."""
        self._encoded = encoded
        self._name = name
        stream = BytesIO(encoded)
        by_name = _FORMAT_OF.get(Path(name).suffix.lower(), "JPEG")  # TGA and a few others have no signature
        try:
            self.header = Image.open(stream, formats=[*_FORMATS, by_name])
        except UnidentifiedImageError as error:  # whose message is an address in memory
            raise self._undecodable("cannot identify image file") from error
        except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
            raise self._undecodable(error) from error
        if not 0 < self.header.width * self.header.height <= MAX_PIXELS:
            size = f"{self.header.width} x {self.header.height}"
            raise self._undecodable(f"expected 1 to {MAX_PIXELS:,} pixels, got {size}")
        self._scan_start = stream.tell()  # of a JPEG file; Pillow reads up to its first scan
        self.is_turned = False
        """Whether `decode` turns or mirrors the image."""
        if upright:
            with suppress(Exception):  # damaged EXIF data count as none
                self.is_turned = self.header.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)

    def decode(self) -> Image.Image:
        """The whole image in RGB, by Pillow; UndecodableImageError if it does not decode."""
        try:
            with self.header as image:
                return _to_rgb(ImageOps.exif_transpose(image) if self.is_turned else image)
        except Exception as error:  # as above
            raise self._undecodable(error) from error

    def opencv_crop(self, box: Box, size: tuple[int, int], mode: str) -> np.ndarray | None:
        """A crop of the image as it is stored, resized; None where OpenCV does not decode it as Pillow does.

        A JPEG file is decoded at the smallest of full, half, quarter and eighth size at which the crop still
        covers `size`. At a smaller size the crop moves by up to half a pixel of the result. The resize is
        PyTorch's, which computes what Pillow's does, up to rounding.

        Args:
            box: of the crop, in pixels of the whole image.
            size: height and width of the result.
            mode: "bicubic" or "bilinear".

        Returns:
            RGB, [height, width, 3].
        """
        import cv2

        if self.header.format != "JPEG" or self.header.mode not in ("RGB", "L"):
            return None
        stray_marker = _STRAY_MARKERS["progressive" in self.header.info]
        if stray_marker.search(self._encoded, self._scan_start, len(self._encoded) - 2):
            return None
        top, left, height, width = box
        factor = next((n for n in _REDUCTIONS if height >= n * size[0] and width >= n * size[1]), 1)
        flag = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        if factor > 1:
            flag |= getattr(cv2, f"IMREAD_REDUCED_GRAYSCALE_{factor}")  # in colours, by the RGB flag
        try:
            pixels = cv2.imdecode(np.frombuffer(self._encoded, dtype=np.uint8), flag)
        except cv2.error:
            return None
        if pixels is None:
            return None
        rows = slice(round(top / factor), round((top + height) / factor))
        columns = slice(round(left / factor), round((left + width) / factor))
        return _resized(pixels[rows, columns], size, mode)

    def _undecodable(self, reason: Exception | str) -> UndecodableImageError:
        kind = f"{type(reason).__name__}: " if isinstance(reason, Exception) else ""
        return UndecodableImageError(
            f"{self._name}: expected an image file that decodes, got {len(self._encoded)} bytes that do not "
            f"({kind}{' '.join(str(reason).split())}); replace or remove the file"
        )


def _resized(pixels: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    """Resize [height, width, channels] with antialiasing to `size`, a height and a width."""
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)
    resized = functional.interpolate(planes, size, mode=mode, antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _to_8_bits(gray: np.ndarray) -> np.ndarray:
    """Scale [H, W] of integers or floating point numbers to uint8; negative values and nan are black.

    White is 65535 for integers. For floating point numbers, where no standard says what it is, it is the
    smallest of 1, 255 and 65535 that no value exceeds. Where values exceed 65535, the largest is white.
    """
    largest = gray.max(where=np.isfinite(gray), initial=0)
    if gray.dtype.kind != "f" and largest < 2**16:
        return (gray.clip(0) >> 8).astype(np.uint8)
    white = next((scale for scale in _FULL_SCALES if largest <= scale), largest)
    return (np.nan_to_num(gray.clip(0, white)) / white * 255).round().astype(np.uint8)
