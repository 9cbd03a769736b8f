"""UPerNet on Focal-L, crops of 640 x 640.

The reported figures are from ImageNet-22K weights; no weights of Focal-L were released.
"""

_base_ = [
    "_base_/upernet.py",
    "_base_/ade20k_640x640.py",
]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(_base_.focal, _delete_=True, variant="focal_large_patch4_window7_224", drop_path_rate=0.3),
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
    auxiliary_head=dict(in_channels=768),
)
