"""Draws boxes and masks, with labels and scores, that a trained detector finds in images.

python detection/predict.py IMAGE ... --config CONFIG --checkpoint FILE [--out DIR] [--threshold 0.3]
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from mmengine.model import BaseModel


def draw(model: "BaseModel", image: "np.ndarray", threshold: float) -> tuple["np.ndarray", str]:
    """The picture of an image's detections, see `openmmlab.predict.Draw`."""
    from mmdet.apis import inference_detector
    from mmdet.visualization import DetLocalVisualizer

    sample = inference_detector(model, image)
    visualizer = DetLocalVisualizer(alpha=0.5)
    visualizer.dataset_meta = model.dataset_meta
    visualizer.add_datasample("", image[..., ::-1], sample, draw_gt=False, pred_score_thr=threshold)
    text = "panoptic segments"
    if "pred_instances" in sample:
        count = int((sample.pred_instances.scores > threshold).sum())
        text = f"{count or 'no'} objects above {threshold}"
    return visualizer.get_image()[..., ::-1], text


def main(argv: list[str] | None = None) -> int:
    """Entry point of the command line."""
    from openmmlab.predict import parse, run

    return run(draw, parse(__doc__.splitlines()[0], argv))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # models, openmmlab, detection
    sys.exit(main())
