"""Mask R-CNN on Focal-fast-T, 3x schedule, multi-scale crops, mixed precision; the release has none."""

_base_ = "mask-rcnn_focal-tiny_fpn_amp-ms-crop-3x_coco.py"
model = dict(backbone=dict(variant="focalv2_tiny_useconv_patch4_window7_224"))
reported = None
