"""Test-time augmentation for detectors with masks, which mmdet's own `DetTTAModel` refuses.

A config's `tta_model`: `dict(type="InstanceTTAModel", tta_cfg=...)`, with the options of `DetTTAModel`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from mmdet.models.roi_heads import HybridTaskCascadeRoIHead
from mmdet.models.test_time_augs import DetTTAModel
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_flip
from mmengine.structures import InstanceData
from torch import Tensor

AXES = {"horizontal": (-1,), "vertical": (-2,), "diagonal": (-2, -1)}


@MODELS.register_module()
class InstanceTTAModel(DetTTAModel):
    """Detects in several views of an image (scales, flips): NMS over the boxes of all views, then the mean of
    the masks that each view gives for the remaining boxes, as the first release of HTC did it.

    Args:
        tta_cfg: `nms` and `max_per_img`, for the boxes of all views together.
        options: of `BaseTTAModel`: `module`, a two-stage detector with masks (Mask R-CNN, Cascade, HTC) or
            its config, and `data_preprocessor`.
    """

    def __init__(self, tta_cfg: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__(tta_cfg=tta_cfg, **options)
        test_cfg = self.module.roi_head.test_cfg
        self.threshold = test_cfg.mask_thr_binary
        test_cfg.mask_thr_binary = -1  # masks as probabilities in steps of 1 / 255

    def test_step(self, data: dict[str, Sequence[Any]]) -> list[DetDataSample]:
        """Detections in the original images.

        Args:
            data: `inputs` and `data_samples`; of each view, those of every image.
        """
        maps, metas, boxes = [], [], []
        for inputs, samples in zip(data["inputs"], data["data_samples"], strict=True):
            maps.append(self._maps({"inputs": inputs, "data_samples": samples}))
            metas.append([sample.metainfo for sample in samples])
            boxes.append(self._detect(maps[-1], metas[-1]))
        merged = self.merge_preds([*zip(*boxes, strict=True)])
        votes: list[Any] = [0] * len(merged)
        for view in zip(maps, metas, strict=True):
            masks = self._masks(*view, [sample.pred_instances for sample in merged])
            votes = [sum_ + mask for sum_, mask in zip(votes, masks, strict=True)]
        for sample, vote in zip(merged, votes, strict=True):
            sample.pred_instances.masks = vote >= self.threshold * 255 * len(maps)
        return merged

    def _maps(self, view: dict[str, Any]) -> tuple[Tensor, ...]:
        """The pyramid of one view."""
        return self.module.extract_feat(self.module.data_preprocessor(view, training=False)["inputs"])

    def _detect(self, maps: tuple[Tensor, ...], metas: list[dict[str, Any]]) -> list[DetDataSample]:
        """Boxes of one view, in the coordinates of the original image, still flipped."""
        samples = [DetDataSample(metainfo=unflipped(meta)) for meta in metas]
        proposals = self.module.rpn_head.predict(maps, samples, rescale=False)
        found = self.module.roi_head.predict(maps, proposals, samples, rescale=True)
        return [
            DetDataSample(
                metainfo=meta,
                pred_instances=InstanceData(bboxes=each.bboxes, scores=each.scores, labels=each.labels),
            )
            for meta, each in zip(metas, found, strict=True)
        ]

    def _masks(
        self, maps: tuple[Tensor, ...], metas: list[dict[str, Any]], found: list[InstanceData]
    ) -> list[Tensor]:
        """What one view says of given boxes: per image [N, H, W], 0 to 255, in the original image."""
        moved = []
        for meta, each in zip(metas, found, strict=True):
            boxes = each.bboxes
            if meta["flip"]:
                boxes = bbox_flip(boxes, meta["ori_shape"], meta["flip_direction"])
            scale = boxes.new_tensor(meta["scale_factor"]).repeat(2)
            moved.append(InstanceData(bboxes=boxes * scale, scores=each.scores, labels=each.labels))
        head, semantic = self.module.roi_head, {}
        if isinstance(head, HybridTaskCascadeRoIHead):
            semantic["semantic_heat"] = head.semantic_head(maps)[1] if head.with_semantic else None
        results = head.predict_mask(
            x=maps,
            batch_img_metas=[unflipped(meta) for meta in metas],
            results_list=moved,
            rescale=True,
            **semantic,
        )
        masks = [each.masks.to(torch.int16) for each in results]
        flips = [AXES[meta["flip_direction"]] if meta["flip"] else () for meta in metas]
        return [mask.flip(axes) for mask, axes in zip(masks, flips, strict=True)]


def unflipped(meta: dict[str, Any]) -> dict[str, Any]:
    """Facts of a view without its flip, which mmdet's heads of several stages fail to undo."""
    return {**meta, "flip": False}
