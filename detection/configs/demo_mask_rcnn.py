"""Mask R-CNN with a small Focal backbone on the demo scenes (`python -m data.demo demo --kinds detection`):
learns in minutes on a CPU. Also an example of a config for a data set of one's own.

The folder of the data is $DEMO/detection, `demo/detection` without that variable.
"""

_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/default_runtime.py",
    "../../openmmlab/configs/recipe.py",
]

# --- The model: 4 stages of 1 or 2 blocks, a pyramid of 64 channels -----------------------------------------

classes = 10
width = 64
roi_head = dict(
    bbox_roi_extractor=dict(out_channels=width, roi_layer=dict(sampling_ratio=2)),
    bbox_head=dict(in_channels=width, fc_out_channels=256, num_classes=classes),
    mask_roi_extractor=dict(out_channels=width, roi_layer=dict(sampling_ratio=2)),
    mask_head=dict(in_channels=width, conv_out_channels=32, num_convs=2, num_classes=classes),
)
model = dict(
    backbone=dict(
        _delete_=True,
        type="FocalBackbone",
        img_size=128,
        embed_dim=32,
        depths=[1, 1, 2, 1],
        num_heads=[1, 2, 4, 8],
        window_size=4,
        focal_pool="fc",
        focal_levels=[2, 2, 2, 2],
        focal_windows=[5, 3, 3, 1],
        expand_sizes=[2, 2, 2, 2],
        use_conv_embed=True,
        drop_path_rate=0.0,
    ),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=width, num_outs=4),
    rpn_head=dict(
        in_channels=width, feat_channels=width, anchor_generator=dict(scales=[6], strides=[4, 8, 16, 32])
    ),
    roi_head=roi_head,
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=200, max_per_img=100), rcnn=dict(sampler=dict(num=32, pos_fraction=0.5))
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=50)),
)

# --- The data: digits look one way only, so they are not flipped --------------------------------------------

data = dict(
    type="CocoDataset",
    data_root="{{$DEMO:demo}}/detection/",
    metainfo=dict(classes=tuple("0123456789")),
)
load = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="Resize", scale=(160, 128), keep_ratio=True),
]
train_pipeline = [*load, dict(type="PackDetInputs")]
test_pipeline = [
    *(load[0], load[2]),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(
    batch_size=2,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        **data,
        ann_file="annotations/instances_train2017.json",
        data_prefix=dict(img="train2017/"),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **data,
        ann_file="annotations/instances_val2017.json",
        data_prefix=dict(img="val2017/"),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type="CocoMetric",
    ann_file=data["data_root"] + "annotations/instances_val2017.json",
    metric=["bbox", "segm"],
)
test_evaluator = val_evaluator

# --- The schedule -------------------------------------------------------------------------------------------

randomness = dict(seed=0)
epochs = 10
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=epochs, val_interval=5)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    **dict(_base_.adamw, optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05)),
    clip_grad=dict(max_norm=10),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", by_epoch=True, T_max=epochs, convert_to_iter_based=True),
]
default_hooks = dict(
    logger=dict(interval=10), checkpoint=dict(interval=5, max_keep_ckpts=2, save_best="coco/bbox_mAP_50")
)
