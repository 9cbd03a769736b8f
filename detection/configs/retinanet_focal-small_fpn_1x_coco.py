"""RetinaNet on Focal-S, 1x schedule."""

_base_ = ["retinanet_focal-tiny_fpn_1x_coco.py", "../../openmmlab/configs/focal_small.py"]
model = dict(
    backbone=dict(
        _base_.focal_small, _delete_=True, out_indices=(1, 2, 3), drop_path_rate=0.2, **_base_.wide
    ),
)
reported = dict(box_ap=45.6, params_m=62, flops_g=367)
