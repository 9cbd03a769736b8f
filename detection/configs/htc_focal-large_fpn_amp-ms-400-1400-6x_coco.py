"""HTC++ on Focal-L, the release's best instance segmentation: Hybrid Task Cascade without the semantic
branch, instances jittered as InstaBoost does, scales from 400 to 1400, soft-NMS and the 6x schedule.

Reported: 50.9 mask AP on val2017 and 51.3 on test-dev; no parameters or FLOPs.
The box AP that the README names beside them is that of ATSS with DyHead. No weights of Focal-L were released.
Schedule, `drop_path_rate`, batch and the scales of testing are not stated: they are chosen here.

InstaBoost's own package (instaboostfast) needs scikit-image and a second build of OpenCV; `InstanceJitter`
does the same to the images in a quarter of the time. With that package at hand, mmdet's
`dict(type="InstaBoost")` goes in front of `LoadAnnotations` instead.
"""

_base_ = [
    "mmdet::htc/htc-without-semantic_r50_fpn_1x_coco.py",
    "_base_/coco.py",
]
custom_imports = dict(
    imports=[*_base_.custom_imports.imports, "detection.instance_jitter", "detection.instance_tta"]
)
model = dict(
    backbone=dict(_base_.focal, _delete_=True, variant="focal_large_patch4_window7_224", with_cp=True),
    neck=dict(in_channels=[192, 384, 768, 1536]),
    # split_thr: class by class, which gives the same boxes; one call for all classes takes ten times as long
    test_cfg=dict(rcnn=dict(nms=dict(type="soft_nms", iou_threshold=0.5, split_thr=1))),
)
train_pipeline = [
    _base_.crops_with_masks[0],
    _base_.crops_with_masks[1],
    dict(type="InstanceJitter", prob=0.5),
    dict(type="RandomResize", scale=[(1600, 400), (1600, 1400)], keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    _base_.test_pipeline[0],
    dict(type="Resize", scale=(1600, 1400), keep_ratio=True),
    *_base_.test_pipeline[2:],
]
tta_model = dict(
    type="InstanceTTAModel",
    tta_cfg=dict(nms=dict(type="soft_nms", iou_threshold=0.5, split_thr=1), max_per_img=100),
)
scales = [dict(type="Resize", scale=(1600, side), keep_ratio=True) for side in (800, 1000, 1200, 1400)]
tta_pipeline = [
    _base_.test_pipeline[0],
    dict(type="TestTimeAug", transforms=[scales, _base_.flips, _base_.pack_view]),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=72)
param_scheduler = _base_.steps_6x
optim_wrapper = dict(_delete_=True, **dict(_base_.adamw, type="AmpOptimWrapper"))
