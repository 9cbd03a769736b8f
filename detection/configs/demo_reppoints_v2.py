"""RepPoints v2 with a small Focal backbone on the demo scenes: the backbone, data and schedule of
demo_mask_rcnn.py, boxes only. The pyramid has strides 8, 16 and 32.
"""

_base_ = "demo_mask_rcnn.py"
custom_imports = dict(
    imports=[*_base_.custom_imports.imports, "detection.bifpn", "detection.reppoints_v2"],
    allow_failed_imports=False,
)

width = 64
norm = dict(type="GN", num_groups=16)
assign_to_points = dict(assigner=dict(type="PointAssigner", scale=4, pos_num=1), pos_weight=-1)
assign_to_boxes = dict(assigner=dict(type="StrideATSSAssigner", topk=9), pos_weight=-1)
model = dict(
    _delete_=True,
    type="RepPointsDetector",
    data_preprocessor=_base_.model.data_preprocessor,
    backbone=dict(**_base_.model.backbone, out_indices=(1, 2, 3)),
    neck=dict(type="BiFPN", in_channels=[64, 128, 256], out_channels=width, num_outs=3, norm_cfg=norm),
    bbox_head=dict(
        type="RepPointsV2Head",
        num_classes=_base_.classes,
        in_channels=width,
        feat_channels=width,
        point_feat_channels=width,
        corner_channels=32,
        stacked_convs=2,
        point_strides=[8, 16, 32],
        verifying_levels=[-1, 0, 0],
        norm_cfg=norm,
        loss_cls=dict(type="QualityFocalLoss", use_sigmoid=True, beta=2.0, loss_weight=1.0),
        loss_bbox_init=dict(type="GIoULoss", loss_weight=1.0),
        loss_bbox_refine=dict(type="GIoULoss", loss_weight=2.0),
    ),
    train_cfg=dict(init=assign_to_points, refine=assign_to_boxes),
    test_cfg=dict(
        nms_pre=200,
        min_bbox_size=0,
        score_thr=0.05,
        nms=dict(type="nms", iou_threshold=0.6),
        max_per_img=50,
    ),
)
load = [_base_.load[0], dict(type="LoadAnnotations", with_bbox=True), _base_.load[2]]
train_pipeline = [*load, dict(type="PackDetInputs")]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_evaluator = dict(metric="bbox")
test_evaluator = val_evaluator
