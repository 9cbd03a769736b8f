"""RetinaNet on Focal-B, 1x schedule."""

_base_ = ["retinanet_focal-tiny_fpn_1x_coco.py", "../../openmmlab/configs/focal_base.py"]
model = dict(
    backbone=dict(_base_.focal_base, _delete_=True, out_indices=(1, 2, 3), drop_path_rate=0.3, **_base_.wide),
    neck=dict(in_channels=[256, 512, 1024]),
)
reported = dict(box_ap=46.3, params_m=101, flops_g=514)
