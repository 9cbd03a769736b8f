"""Evaluates a detector.

python detection/test.py CONFIG CHECKPOINT [--work-dir DIR] [--tta] [--cfg-options KEY=VALUE ...]
torchrun --nproc_per_node 8 detection/test.py CONFIG CHECKPOINT
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # models, openmmlab, detection
    from openmmlab.runner import test

    sys.exit(test())
