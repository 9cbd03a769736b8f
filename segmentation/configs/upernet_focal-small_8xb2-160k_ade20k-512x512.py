"""UPerNet on Focal-S, crops of 512 x 512."""

_base_ = "upernet_focal-tiny_8xb2-160k_ade20k-512x512.py"
model = dict(
    backbone=dict(variant="focal_small_patch4_window7_224"),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
reported = dict(miou=48.0, miou_ms=50.0, params_m=85, flops_g=1130)
