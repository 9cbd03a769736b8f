"""What every config of detection and segmentation trains with: the backbone's registration, the operators
it runs on, AdamW, and how far pooled levels reach.

mmengine lets no two base files define the same name, so what a config needs has a name of its own here, and
the config says where it goes: `optim_wrapper = dict(_delete_=True, **_base_.adamw)`.
"""

custom_imports = dict(imports=["openmmlab.mmcv_ops", "openmmlab.focal_backbone"], allow_failed_imports=False)

# The backbone, to which each config adds its `variant`. Windows that the pooled levels of Focal's four stages
# cover are not a classifier's 7, 5, 3, 1, because maps are larger here; its tables are resized. The paper's
# detectors do so, for their FLOPs agree: RetinaNet T, S, B at 800 x 1280 take 265, 365, 518 G with these and
# 257, 354, 503 G with a classifier's, and are reported at 265, 367, 514. For segmenters most of the gap
# stays (tools/results). Focal-fast, which chooses keys by distance, ignores them.
focal = dict(type="FocalBackbone", focal_windows=[15, 13, 9, 7], drop_path_rate=0.2)

# no decay for norms (in necks and heads as well), bias tables and the position embedding
no_decay = dict(
    norm_decay_mult=0.0,
    custom_keys=dict(
        absolute_pos_embed=dict(decay_mult=0.0),
        relative_position_bias_table=dict(decay_mult=0.0),
    ),
)
adamw = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=no_decay,
)
