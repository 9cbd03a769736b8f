"""Mask R-CNN on Focal-S, 3x schedule, several scales and crops, mixed precision."""

_base_ = ["mask-rcnn_focal-tiny_fpn_amp-ms-crop-3x_coco.py", "../../openmmlab/configs/focal_small.py"]
model = dict(
    backbone=dict(_base_.focal_small, _delete_=True, drop_path_rate=0.2, **_base_.wide),
)
reported = dict(box_ap=48.8, mask_ap=43.8, params_m=71, flops_g=401)
