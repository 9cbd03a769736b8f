"""RetinaNet on Focal-S, 1x schedule."""

_base_ = "retinanet_focal-tiny_fpn_1x_coco.py"
model = dict(backbone=dict(variant="focal_small_patch4_window7_224"))
reported = dict(box_ap=45.6, params_m=62, flops_g=367)
