"""Mask R-CNN on Focal-T, 1x schedule."""

_base_ = [
    "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
    "_base_/coco.py",
]
model = dict(
    backbone=dict(_base_.focal, _delete_=True, variant="focal_tiny_patch4_window7_224"),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(_delete_=True, **_base_.adamw)
param_scheduler = _base_.steps_1x
