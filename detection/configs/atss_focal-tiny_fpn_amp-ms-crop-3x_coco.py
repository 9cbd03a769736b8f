"""ATSS on Focal-T, 3x schedule, several scales and crops, mixed precision."""

_base_ = [
    "mmdet::atss/atss_r50_fpn_1x_coco.py",
    "_base_/coco.py",
]
# the pyramid begins at stride 8: stage 0 has no output, since nothing would train its norm
model = dict(
    backbone=dict(
        _base_.focal, _delete_=True, variant="focal_tiny_patch4_window7_224", out_indices=(1, 2, 3)
    ),
    neck=dict(in_channels=[192, 384, 768], start_level=0),
)
train_pipeline = _base_.crops_with_boxes
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
train_cfg = dict(max_epochs=36)
param_scheduler = _base_.steps_3x
optim_wrapper = dict(_delete_=True, **dict(_base_.adamw, type="AmpOptimWrapper"))
