"""Pictures and their files, for tests of what reads images."""

from io import BytesIO

import numpy as np
from PIL import Image


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some texture: small noise, enlarged, and a little noise on top."""
    draw = np.random.default_rng(seed)
    small = Image.fromarray(draw.integers(0, 256, (8, 8 * width // height, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int64)
    return Image.fromarray((smooth + draw.integers(-8, 9, (height, width, 1))).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """The content of an image file; options of Pillow's `save`."""
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
