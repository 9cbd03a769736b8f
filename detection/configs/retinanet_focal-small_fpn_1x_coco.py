"""RetinaNet on Focal-S, 1x schedule."""

_base_ = "retinanet_focal-tiny_fpn_1x_coco.py"
model = dict(backbone=dict(variant="focal_small_patch4_window7_224"))
