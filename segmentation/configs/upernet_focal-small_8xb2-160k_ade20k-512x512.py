"""UPerNet on Focal-S, crops of 512 x 512."""

_base_ = "upernet_focal-tiny_8xb2-160k_ade20k-512x512.py"
model = dict(backbone=dict(variant="focal_small_patch4_window7_224"))
