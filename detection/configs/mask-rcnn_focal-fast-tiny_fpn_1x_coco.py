"""Mask R-CNN on Focal-fast-T, 1x schedule; the release has none."""

_base_ = "mask-rcnn_focal-tiny_fpn_1x_coco.py"
model = dict(backbone=dict(variant="focalv2_tiny_useconv_patch4_window7_224"))
reported = None
