"""RepPoints v2 on Focal-T, 3x schedule, several scales and crops, mixed precision.

Losses, assignment and NMS are those of the RepPoints v2 authors' GIoU configs. The release does not say with
which neck its row was trained; with this one, FPN, there are 40 M parameters.
"""

_base_ = [
    "mmdet::reppoints/reppoints-moment_r50_fpn-gn_head-gn_2x_coco.py",
    "_base_/coco.py",
    "../../openmmlab/configs/focal_tiny.py",
]
custom_imports = dict(
    imports=[*_base_.custom_imports.imports, "detection.reppoints_v2"], allow_failed_imports=False
)
# the pyramid begins at stride 8: stage 0 has no output, since nothing would train its norm
model = dict(
    backbone=dict(_base_.focal_tiny, _delete_=True, out_indices=(1, 2, 3), drop_path_rate=0.2, **_base_.wide),
    neck=dict(in_channels=[192, 384, 768], start_level=0),
    bbox_head=dict(
        type="RepPointsV2Head",
        transform_method="explicit_corners",
        loss_bbox_init=dict(_delete_=True, type="GIoULoss", loss_weight=1.0),
        loss_bbox_refine=dict(_delete_=True, type="GIoULoss", loss_weight=2.0),
    ),
    train_cfg=dict(refine=dict(assigner=dict(_delete_=True, type="StrideATSSAssigner", topk=9))),
    test_cfg=dict(nms=dict(iou_threshold=0.6)),
)
train_pipeline = _base_.crops_with_boxes
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
train_cfg = dict(max_epochs=36)
param_scheduler = _base_.steps_3x
optim_wrapper = dict(
    _delete_=True,
    **dict(_base_.adamw, type="AmpOptimWrapper"),
    clip_grad=dict(max_norm=35, norm_type=2),
)
reported = dict(box_ap=51.2, params_m=45, flops_g=491)
