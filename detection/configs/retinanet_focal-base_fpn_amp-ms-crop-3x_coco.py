"""RetinaNet on Focal-B, 3x schedule, several scales and crops, mixed precision."""

_base_ = "retinanet_focal-tiny_fpn_amp-ms-crop-3x_coco.py"
model = dict(
    backbone=dict(variant="focal_base_patch4_window7_224", drop_path_rate=0.3),
    neck=dict(in_channels=[256, 512, 1024]),
)
