"""Mask R-CNN on Focal-fast-B, 3x schedule, multi-scale crops, mixed precision; the release has none."""

_base_ = "mask-rcnn_focal-tiny_fpn_amp-ms-crop-3x_coco.py"
model = dict(
    backbone=dict(variant="focalv2_base_useconv_patch4_window7_224", drop_path_rate=0.3),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
reported = None
