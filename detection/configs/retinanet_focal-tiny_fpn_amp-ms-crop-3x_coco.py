"""RetinaNet on Focal-T, 3x schedule, several scales and crops, mixed precision."""

_base_ = "retinanet_focal-tiny_fpn_1x_coco.py"
train_pipeline = _base_.crops_with_boxes
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
train_cfg = dict(max_epochs=36)
param_scheduler = _base_.steps_3x
optim_wrapper = dict(type="AmpOptimWrapper")
