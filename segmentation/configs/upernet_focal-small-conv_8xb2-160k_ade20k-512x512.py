"""UPerNet on Focal-S with convolutional patch embeddings, crops of 512 x 512.

The release reports no segmentation results under this name; see `reported` of the variant without.
"""

_base_ = ["upernet_focal-small_8xb2-160k_ade20k-512x512.py", "../../openmmlab/configs/focal_small_conv.py"]
model = dict(
    backbone=dict(_base_.focal_small_conv, _delete_=True, drop_path_rate=0.3, **_base_.wide),
)
reported = None
