"""UPerNet on Focal-fast-T, crops of 512 x 512.

The release reports no segmentation results of Focal-fast.
"""

_base_ = ["upernet_focal-tiny_8xb2-160k_ade20k-512x512.py", "../../openmmlab/configs/focal_fast_tiny.py"]
model = dict(
    backbone=dict(_delete_=True, drop_path_rate=0.3, **_base_.focal_fast_tiny),
)
reported = None
