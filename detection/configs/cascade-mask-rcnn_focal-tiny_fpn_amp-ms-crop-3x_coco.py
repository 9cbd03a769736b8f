"""Cascade Mask R-CNN on Focal-T, 3x schedule, several scales and crops, mixed precision.

As in Swin Transformer's comparison, and as the reported size asks for: box heads of four convolutions and one
linear layer, with BatchNorm over all processes, regressed with the GIoU loss.
"""

_base_ = [
    "mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py",
    "_base_/coco.py",
]
model = dict(
    backbone=dict(_base_.focal, _delete_=True, variant="focal_tiny_patch4_window7_224"),
    neck=dict(in_channels=[96, 192, 384, 768]),
    roi_head=dict(
        bbox_head=[
            dict(
                head,
                type="ConvFCBBoxHead",
                num_shared_convs=4,
                num_shared_fcs=1,
                conv_out_channels=256,
                norm_cfg=dict(type="BN"),
                reg_class_agnostic=False,
                reg_decoded_bbox=True,
                loss_bbox=dict(type="GIoULoss", loss_weight=10.0),
            )
            for head in _base_.model.roi_head.bbox_head
        ]
    ),
)
sync_bn = "torch"  # takes effect in distributed training
train_pipeline = _base_.crops_with_masks
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
train_cfg = dict(max_epochs=36)
param_scheduler = _base_.steps_3x
optim_wrapper = dict(_delete_=True, **dict(_base_.adamw, type="AmpOptimWrapper"))
