"""What every config of detection and segmentation trains with: the backbone's registration, the operators
it runs on, and AdamW.

mmengine lets no two base files define the same name, so what a config needs has a name of its own here, and
the config says where it goes: `optim_wrapper = dict(_delete_=True, **_base_.adamw)`.
"""

custom_imports = dict(
    imports=["openmmlab.ops_bridge", "openmmlab.focal_backbone"], allow_failed_imports=False
)

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
