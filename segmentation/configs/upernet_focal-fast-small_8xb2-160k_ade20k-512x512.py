"""UPerNet on Focal-fast-S, crops of 512 x 512.

The release reports no segmentation results of Focal-fast.
"""

_base_ = ["upernet_focal-small_8xb2-160k_ade20k-512x512.py", "../../openmmlab/configs/focal_fast_small.py"]
model = dict(
    backbone=dict(_delete_=True, drop_path_rate=0.3, **_base_.focal_fast_small),
)
reported = None
