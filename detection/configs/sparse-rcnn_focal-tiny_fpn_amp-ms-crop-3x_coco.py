"""Sparse R-CNN with 300 proposals on Focal-T, 3x schedule, several scales and crops, mixed precision.

The release does not say how many proposals its row has. Gradients are clipped as in mmdet's base config.
"""

_base_ = [
    "mmdet::sparse_rcnn/sparse-rcnn_r50_fpn_300-proposals_crop-ms-480-800-3x_coco.py",
    "_base_/coco.py",
]
stages = _base_.model.train_cfg.rcnn
# In float16 a sure class has 1 - p = 0, and the base's eps of 1e-12 is 0 as well: the cost of a match would
# be infinite, and matching would fail.
costs = [dict(stages[0].assigner.match_costs[0], eps=1e-4), *stages[0].assigner.match_costs[1:]]
model = dict(
    backbone=dict(_base_.focal, _delete_=True, variant="focal_tiny_patch4_window7_224"),
    neck=dict(in_channels=[96, 192, 384, 768]),
    train_cfg=dict(rcnn=[dict(stage, assigner=dict(stage.assigner, match_costs=costs)) for stage in stages]),
)
train_pipeline = _base_.crops_with_boxes
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
param_scheduler = _base_.steps_3x
optim_wrapper = dict(
    _delete_=True,
    **dict(_base_.adamw, type="AmpOptimWrapper"),
    clip_grad=dict(max_norm=1, norm_type=2),
)
