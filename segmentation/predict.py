"""Colours each pixel of images by its predicted class, with a legend beside the image.

python segmentation/predict.py IMAGE ... --config CONFIG --checkpoint FILE [--out DIR] [--threshold 0]
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from mmengine.model import BaseModel

OPACITY = 0.55  # of colours over the image
LINE, SWATCH, MARGIN = 28, 20, 12  # pixels of the legend: height of a line, side of a colour's square, margin
FONT_SIZE = 16


def draw(model: "BaseModel", image: np.ndarray, threshold: float) -> tuple[np.ndarray, str]:
    """An image's coloured pixels and their legend, see `openmmlab.predict.Draw`.

    Pixels whose class has a probability below `threshold` keep their own colour.
    """
    from mmseg.apis import inference_model

    sample = inference_model(model, image)
    chances = sample.seg_logits.data  # [classes, H, W], or of two classes the second's probability alone
    chances = torch.cat([1 - chances, chances]) if len(chances) == 1 else chances.softmax(dim=0)
    labels = sample.pred_sem_seg.data.long()  # [1, H, W]
    sure = (chances.gather(0, labels)[0] >= threshold).cpu().numpy()
    labels = labels[0].cpu().numpy()
    palette = np.array(model.dataset_meta["palette"], dtype=np.uint8)  # [classes, 3], RGB
    shares = np.bincount(labels[sure], minlength=len(palette)) / labels.size
    found = [int(number) for number in np.argsort(-shares, kind="stable") if shares[number] > 0]
    names = [f"{model.dataset_meta['classes'][number]}  {shares[number]:.1%}" for number in found]
    picture = beside(
        overlay(image[..., ::-1], labels, sure, palette), legend(names, palette[found], len(image))
    )
    return picture[..., ::-1], f"{len(found)} classes"


def overlay(image: np.ndarray, labels: np.ndarray, where: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Blend the colours of labels [H, W] into an RGB image [H, W, 3], at the pixels `where` [H, W]."""
    mixed = (1 - OPACITY) * image + OPACITY * palette[labels]
    return np.where(where[..., None], mixed.round(), image).astype(np.uint8)


def legend(names: Sequence[str], colours: np.ndarray, height: int) -> np.ndarray:
    """Names beside squares of their colours [N, 3], in as many columns as fit the height, [H, W, 3]."""
    font = ImageFont.load_default(FONT_SIZE)
    rows = max(1, (height - MARGIN) // LINE)
    widest = max((font.getlength(name) for name in names), default=0)
    column = round(MARGIN + SWATCH + MARGIN + widest)
    canvas = Image.new("RGB", (column * -(-len(names) // rows) + MARGIN, max(height, LINE + MARGIN)), "white")
    pen = ImageDraw.Draw(canvas)
    for number, (name, colour) in enumerate(zip(names, colours.tolist(), strict=True)):
        left, top = MARGIN + number // rows * column, MARGIN // 2 + number % rows * LINE
        square = top + (LINE - SWATCH) // 2
        pen.rectangle((left, square, left + SWATCH, square + SWATCH), fill=tuple(colour), outline="gray")
        pen.text((left + SWATCH + MARGIN, top + LINE / 2), name, fill="black", font=font, anchor="lm")
    return np.asarray(canvas)


def beside(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Two pictures side by side; the shorter one is padded with white."""
    height = max(len(left), len(right))
    parts = [np.pad(x, ((0, height - len(x)), (0, 0), (0, 0)), constant_values=255) for x in (left, right)]
    return np.concatenate(parts, axis=1)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command's arguments."""
    from openmmlab.predict import parse

    return parse(__doc__.splitlines()[0], argv, threshold=0.0)


def main(argv: list[str] | None = None) -> int:
    """Entry point of the command line."""
    from openmmlab.predict import run

    return run(draw, parse(argv))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # models, openmmlab, segmentation
    sys.exit(main())
