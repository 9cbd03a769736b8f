"""ATSS with DyHead on Focal-L, the release's best detector, by mmdet's recipe for Swin-L: scales from 480 to
1200 and the 2x schedule.

Reported: 58.7 box AP on val2017 and 58.9 on test-dev, tested at several scales, and 56.4 on val2017 at one,
with 229 M parameters. The release's README gives the box AP of its largest model alone; method, size and AP
at one scale are in the comparison table of the FocalNet paper (arXiv 2203.11926). No weights of Focal-L were
released. Windows are of 12 tokens, as Swin-L's are: with 7, as in the other configs of Focal-L, the detector
has 213 M parameters. The scales of testing are chosen here.
"""

_base_ = [
    "mmdet::dyhead/atss_r50_fpn_dyhead_1x_coco.py",
    "_base_/coco.py",
]
model = dict(
    data_preprocessor=dict(pad_size_divisor=128),
    backbone=dict(
        dict(_base_.focal, window_size=12),
        _delete_=True,
        variant="focal_large_patch4_window7_224",
        out_indices=(1, 2, 3),
        with_cp=True,
    ),
    neck=[
        dict(_base_.model.neck[0], in_channels=[384, 768, 1536], start_level=0),
        dict(_base_.model.neck[1], zero_init_offset=False),
    ],
    bbox_head=dict(pred_kernel_size=1, anchor_generator=dict(center_offset=0.5)),
)
train_pipeline = [
    *_base_.crops_with_boxes[:2],
    dict(type="RandomResize", scale=[(2000, 480), (2000, 1200)], keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    _base_.test_pipeline[0],
    dict(type="Resize", scale=(2000, 1200), keep_ratio=True),
    *_base_.test_pipeline[2:],
]
tta_model = dict(type="DetTTAModel", tta_cfg=dict(nms=dict(type="nms", iou_threshold=0.6), max_per_img=100))
scales = [dict(type="Resize", scale=(2000, side), keep_ratio=True) for side in (800, 1000, 1200, 1400)]
tta_pipeline = [
    _base_.test_pipeline[0],
    dict(type="TestTimeAug", transforms=[scales, _base_.flips, _base_.pack_view]),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=24)
param_scheduler = _base_.steps_2x
optim_wrapper = dict(
    _delete_=True,
    **dict(_base_.adamw, type="AmpOptimWrapper", optimizer=dict(_base_.adamw.optimizer, lr=5e-5)),
)
