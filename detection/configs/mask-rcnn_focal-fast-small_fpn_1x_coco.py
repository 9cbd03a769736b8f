"""Mask R-CNN on Focal-fast-S, 1x schedule.

The release reports no detection results of Focal-fast.
"""

_base_ = ["mask-rcnn_focal-tiny_fpn_1x_coco.py", "../../openmmlab/configs/focal_fast_small.py"]
model = dict(
    backbone=dict(_delete_=True, drop_path_rate=0.2, **_base_.focal_fast_small),
)
reported = None
