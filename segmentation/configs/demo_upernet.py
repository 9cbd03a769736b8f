"""UPerNet with a small Focal backbone on the demo scenes (`python -m data.demo demo --kinds segmentation`):
learns in minutes on a CPU. Also an example of a config for a data set of one's own.

The folder of the data is $DEMO/segmentation, `demo/segmentation` without that variable.
"""

_base_ = [
    "mmseg::_base_/models/upernet_swin.py",
    "mmseg::_base_/default_runtime.py",
    "../../openmmlab/configs/recipe.py",
]

# --- The model: 4 stages of 1 or 2 blocks, a head of 32 channels --------------------------------------------
# GroupNorm, since BatchNorm over several processes needs GPUs.

size = (128, 160)  # rows, columns
classes = ("background", *"0123456789")
head = dict(
    channels=32,
    num_classes=len(classes),
    norm_cfg=dict(type="GN", num_groups=8),
    dropout_ratio=0.0,
)
# Five of six pixels are background, and which digit the sixth belongs to is what takes long to learn.
loss = dict(type="CrossEntropyLoss", use_sigmoid=False, class_weight=[1.0] + [4.0] * 10)
model = dict(
    data_preprocessor=dict(size=size),
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
    decode_head=dict(in_channels=[32, 64, 128, 256], loss_decode=dict(loss, loss_weight=1.0), **head),
    auxiliary_head=dict(in_channels=128, loss_decode=dict(loss, loss_weight=0.4), **head),
)

# --- The data: digits look one way only, so they are not flipped --------------------------------------------
# Every image gets exactly the size above: the loss cannot weigh the classes where labels are padded.

palette = [
    *([40, 40, 40], [230, 25, 75], [60, 180, 75], [255, 225, 25], [0, 130, 200], [245, 130, 48]),
    *([145, 30, 180], [70, 240, 240], [240, 50, 230], [210, 245, 60], [170, 110, 40]),
]
data = dict(
    type="BaseSegDataset",
    data_root="{{$DEMO:demo}}/segmentation/",
    metainfo=dict(classes=classes, palette=palette),
    reduce_zero_label=True,  # 0 in the label images is nothing, 1 the first class
)
load = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations")]
train_pipeline = [
    *load,
    dict(type="Resize", scale=(160, 128), keep_ratio=False),
    dict(type="PackSegInputs"),
]
test_pipeline = [load[0], dict(type="Resize", scale=(160, 128), keep_ratio=True), load[1], train_pipeline[-1]]
scales = [
    dict(type="Resize", scale=(int(160 * ratio), int(128 * ratio)), keep_ratio=True)
    for ratio in (0.75, 1.0, 1.25, 1.5)
]
tta_pipeline = [
    load[0],
    dict(type="TestTimeAug", transforms=[scales, [load[1]], [train_pipeline[-1]]]),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        **data,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **data,
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator

# --- The schedule -------------------------------------------------------------------------------------------

epochs = 20
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=epochs, val_interval=5)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
# The longest key that a name contains decides on its own, so the heads' norms need keys longer than "head".
heads_learn_faster = dict(
    custom_keys={
        **_base_.no_decay.custom_keys,
        "head": dict(lr_mult=3.0),
        "gn.weight": dict(lr_mult=3.0, decay_mult=0.0),
        "gn.bias": dict(lr_mult=3.0, decay_mult=0.0),
    }
)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(_base_.no_decay, **heads_learn_faster),
    clip_grad=dict(max_norm=1),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", by_epoch=True, T_max=epochs, convert_to_iter_based=True),
]
log_processor = dict(by_epoch=True)
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=10),
    checkpoint=dict(type="CheckpointHook", interval=5, max_keep_ckpts=2, save_best="mIoU"),
)
