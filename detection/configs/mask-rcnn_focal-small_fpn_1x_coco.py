"""Mask R-CNN on Focal-S, 1x schedule."""

_base_ = ["mask-rcnn_focal-tiny_fpn_1x_coco.py", "../../openmmlab/configs/focal_small.py"]
model = dict(
    backbone=dict(_base_.focal_small, _delete_=True, drop_path_rate=0.2, **_base_.wide),
)
reported = dict(box_ap=47.4, mask_ap=42.8, params_m=71, flops_g=401)
