"""Mask R-CNN on Focal-S, 1x schedule."""

_base_ = "mask-rcnn_focal-tiny_fpn_1x_coco.py"
model = dict(backbone=dict(variant="focal_small_patch4_window7_224"))
reported = dict(box_ap=47.4, mask_ap=42.8, params_m=71, flops_g=401)
