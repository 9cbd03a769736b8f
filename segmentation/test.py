"""Evaluates a segmenter, at one scale or at several with flips.

python segmentation/test.py CONFIG CHECKPOINT [--work-dir DIR] [--multi-scale] [--cfg-options KEY=VALUE ...]
torchrun --nproc_per_node 8 segmentation/test.py CONFIG CHECKPOINT
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # models, openmmlab, segmentation
    from openmmlab.runner import test

    sys.exit(test())
