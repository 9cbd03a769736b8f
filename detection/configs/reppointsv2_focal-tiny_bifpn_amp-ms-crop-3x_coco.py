"""RepPoints v2 on Focal-T, 3x schedule, several scales and crops, mixed precision.

Neck, losses, assignment and NMS are those of Swin-T's public RepPoints v2 config, whose row has 45 M
parameters as well, and they are the RepPoints v2 authors': two layers of BiFPN, GIoU losses, a quality focal
loss for classes. That config trains at shorter sides of 480 to 960, without crops; here they are those of the
other 3x configs, 480 to 800, and half of the images are cropped first.
"""

_base_ = [
    "mmdet::reppoints/reppoints-moment_r50_fpn-gn_head-gn_2x_coco.py",
    "_base_/coco.py",
]
custom_imports = dict(
    imports=[*_base_.custom_imports.imports, "detection.bifpn", "detection.reppoints_v2"],
    allow_failed_imports=False,
)
# the pyramid begins at stride 8: stage 0 has no output, since nothing would train its norm
model = dict(
    backbone=dict(
        _base_.focal, _delete_=True, variant="focal_tiny_patch4_window7_224", out_indices=(1, 2, 3)
    ),
    neck=dict(
        _delete_=True,
        type="BiFPN",
        in_channels=[192, 384, 768],
        out_channels=256,
        num_outs=5,
        num_repeat=2,
        norm_cfg=dict(type="GN", num_groups=32),
    ),
    bbox_head=dict(
        type="RepPointsV2Head",
        transform_method="explicit_corners",
        loss_cls=dict(_delete_=True, type="QualityFocalLoss", use_sigmoid=True, beta=2.0, loss_weight=1.0),
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
optim_wrapper = dict(_delete_=True, **dict(_base_.adamw, type="AmpOptimWrapper"))
