"""RetinaNet on Focal-S, 3x schedule, several scales and crops, mixed precision."""

_base_ = "retinanet_focal-tiny_fpn_amp-ms-crop-3x_coco.py"
model = dict(backbone=dict(variant="focal_small_patch4_window7_224"))
