"""Mask R-CNN on Focal-fast-T, 3x schedule, several scales and crops, mixed precision.

The release reports no detection results of Focal-fast.
"""

_base_ = ["mask-rcnn_focal-tiny_fpn_amp-ms-crop-3x_coco.py", "../../openmmlab/configs/focal_fast_tiny.py"]
model = dict(
    backbone=dict(_delete_=True, drop_path_rate=0.2, **_base_.focal_fast_tiny),
)
reported = None
