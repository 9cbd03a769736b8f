"""RetinaNet on Focal-T, 1x schedule."""

_base_ = [
    "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py",
    "_base_/coco.py",
]
# the pyramid begins at stride 8: stage 0 has no output, since nothing would train its norm
model = dict(
    backbone=dict(
        _base_.focal, _delete_=True, variant="focal_tiny_patch4_window7_224", out_indices=(1, 2, 3)
    ),
    neck=dict(in_channels=[192, 384, 768], start_level=0),
)
optim_wrapper = dict(_delete_=True, **_base_.adamw)
param_scheduler = _base_.steps_1x
