"""Mask R-CNN on Focal-fast-B, 1x schedule.

The release reports no detection results of Focal-fast.
"""

_base_ = ["mask-rcnn_focal-tiny_fpn_1x_coco.py", "../../openmmlab/configs/focal_fast_base.py"]
model = dict(
    backbone=dict(_delete_=True, drop_path_rate=0.3, **_base_.focal_fast_base),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
reported = None
