"""From the encoded bytes of an image file to a PIL image in RGB."""

import struct
import zlib
from io import BytesIO

import numpy as np
from PIL import Image

_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class UndecodableImageError(ValueError):
    """The bytes of an image were read but do not decode; the message names the image."""


def decode_rgb(encoded: bytes, name: str) -> Image.Image:
    """Decode an image file to RGB, ignoring the EXIF orientation as the original does.

    16-bit gray is scaled down to 8 bits instead of being clipped to white; an alpha channel is dropped.

    Args:
        encoded: the content of the image file.
        name: path of the image, for the error.

    Raises:
        UndecodableImageError: the bytes are empty, truncated or not an image.
    """
    try:
        with Image.open(BytesIO(encoded)) as image:
            return _to_rgb(image)
    except _DECODER_ERRORS as error:
        raise UndecodableImageError(
            f"{name}: expected an image file that decodes, got {len(encoded)} bytes that do not "
            f"({type(error).__name__}: {error}); replace or remove the file"
        ) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode.startswith("I"):
        gray = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(gray.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(np.asarray(image).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")
