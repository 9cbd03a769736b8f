"""UPerNet on Focal-T, crops of 512 x 512."""

_base_ = [
    "_base_/upernet.py",
    "_base_/ade20k_512x512.py",
]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(_base_.focal, _delete_=True, variant="focal_tiny_patch4_window7_224", drop_path_rate=0.3),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
