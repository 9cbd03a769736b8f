"""UPerNet with an auxiliary FCN head, and its 160k schedule: those of Swin Transformer's segmenters, which
Focal Transformer's follow.

MODEL_ZOO.md quotes what the release reports for each. Its README does not give the recipe; stochastic depth
of 0.3 in every size is that of MMSegmentation's Swin configs.

Backbones start from fresh weights unless `--pretrained FILE` names a classifier's, which the reported figures
need.

Unlike in Swin's configs no norm decays, also those of the heads, which are called `bn`. Theirs:
`optim_wrapper=dict(paramwise_cfg=dict(norm_decay_mult=None, custom_keys=dict(norm=dict(decay_mult=0.0))))`.
"""

_base_ = [
    "mmseg::_base_/models/upernet_swin.py",
    "mmseg::_base_/default_runtime.py",
    "mmseg::_base_/schedules/schedule_160k.py",
    "../../../openmmlab/configs/recipe.py",
]
model = dict(decode_head=dict(num_classes=150), auxiliary_head=dict(num_classes=150))
optim_wrapper = dict(
    _delete_=True,
    **dict(_base_.adamw, optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01)),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=1500, end=160000),
]
auto_scale_lr = dict(enable=False, base_batch_size=16)
