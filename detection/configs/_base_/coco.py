"""Schedules and training pipelines on COCO, those of Swin Transformer's detectors, which Focal Transformer's
follow; each config picks from them.

MODEL_ZOO.md quotes what the release reports for each. Its README does not give the recipe.

Backbones start from fresh weights unless a classifier's are named, which the reported figures need:
`--pretrained FILE`, or `init_cfg=dict(type="Pretrained", checkpoint=FILE)` of the backbone.

Unlike in Swin's configs no norm decays, also where a head does not call it `norm` (but `bn`, `gn`). Theirs:
`optim_wrapper=dict(paramwise_cfg=dict(norm_decay_mult=None, custom_keys=dict(norm=dict(decay_mult=0.0))))`.
"""

_base_ = "../../../openmmlab/configs/recipe.py"

warm_up = dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000)
steps_1x = [warm_up, dict(type="MultiStepLR", begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1)]
steps_2x = [warm_up, dict(type="MultiStepLR", begin=0, end=24, by_epoch=True, milestones=[16, 22], gamma=0.1)]
steps_3x = [warm_up, dict(type="MultiStepLR", begin=0, end=36, by_epoch=True, milestones=[27, 33], gamma=0.1)]
steps_6x = [warm_up, dict(type="MultiStepLR", begin=0, end=72, by_epoch=True, milestones=[63, 69], gamma=0.1)]

# shorter side 480 to 800, longer at most 1333; half of the images are cropped first, at a smaller scale
multi_scale = dict(
    type="RandomChoiceResize", scales=[(side, 1333) for side in range(480, 801, 32)], keep_ratio=True
)
before_crop = dict(type="RandomChoiceResize", scales=[(400, 1333), (500, 1333), (600, 1333)], keep_ratio=True)
crop = dict(type="RandomCrop", crop_type="absolute_range", crop_size=(384, 600), allow_negative_crop=True)
crops_with_boxes = [
    dict(type="LoadImageFromFile", backend_args=None),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="RandomChoice", transforms=[[multi_scale], [before_crop, crop, multi_scale]]),
    dict(type="PackDetInputs"),
]
crops_with_masks = [
    crops_with_boxes[0],
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    *crops_with_boxes[2:],
]

# views of test-time augmentation: each scale as it is and flipped
flips = [dict(type="RandomFlip", prob=0.0), dict(type="RandomFlip", prob=1.0)]
view_keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "flip", "flip_direction")
pack_view = [dict(type="PackDetInputs", meta_keys=view_keys)]
