"""Trains a segmenter.

python segmentation/train.py CONFIG [--work-dir DIR] [--resume] [--amp] [--cfg-options KEY=VALUE ...]
torchrun --nproc_per_node 8 segmentation/train.py CONFIG
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # models, openmmlab, segmentation
    from openmmlab.runner import train

    sys.exit(train())
