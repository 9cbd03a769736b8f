"""UPerNet on Focal-B, crops of 512 x 512."""

_base_ = "upernet_focal-tiny_8xb2-160k_ade20k-512x512.py"
model = dict(
    backbone=dict(variant="focal_base_patch4_window7_224"),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
