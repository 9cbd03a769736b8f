"""RepPoints v2 for MMDetection 3. Importing this module registers its head and assigner.

Chen et al., "RepPoints v2: Verification Meets Regression for Object Detection" (NeurIPS 2020). This
module adds verification to MMDetection's RepPointsHead, after section 3 of the paper:

- Verification tasks: heatmaps and offsets of top-left and bottom-right corners, behind CornerNet's pooling,
  and one foreground map per class (within boxes). `detection.corner_targets` has their targets.
- Fusion, in three ways: the branches share the regression features (multi-task learning); foreground features
  and corner maps join the features that regress and classify (feature enhancement); regressed boxes take the
  best verified corners around them (joint inference).
- Explicit corners: the first two of the nine points are the box's corners, so both tasks are about the same.

Layer widths, loss weights and the levels of joint inference are those of the authors' released configs: a 3x3
convolution before the branches, 64 channels where corners are pooled, weights 0.25, 1 and 0.1 for heatmaps,
offsets and foreground, ATSS to assign refined boxes, and no snapping of the finest level's boxes.

Departures: a box is spanned by its two corner points in any order, and the points start as a grid,
`point_base_scale` cells wide, around their cell. (The release starts all points in one place and does not
order the corners; inverted boxes then have a negative GIoU loss, unless a pixel is added to their sides.) The
foreground loss ignores the batch's padding too; both corner kinds share one average; denominators are at
least 1, for images without boxes.

Letters: B images; C classes; H, W cells of a level.
"""

from collections.abc import Sequence
from typing import Any

import torch
from mmcv.cnn import ConvModule
from mmdet.models.dense_heads.corner_head import BiCornerPool
from mmdet.models.dense_heads.reppoints_head import RepPointsHead
from mmdet.models.losses import QualityFocalLoss
from mmdet.models.task_modules import AssignResult, ATSSAssigner
from mmdet.models.utils import multi_apply
from mmdet.registry import MODELS, TASK_UTILS
from mmdet.structures.bbox import bbox_overlaps
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, pad

from detection.corner_targets import LevelTargets, level_targets, snap_to_corners

CORNER_MAPS = 6  # two scores, two times two offsets
REGRESSED_ONLY = -1
FIXED = {  # options of RepPointsHead that have one value here
    "transform_method": "explicit_corners",
    "use_grid_points": False,
    "center_init": True,
    "conv_cfg": None,
}

LOSS_CORNER = {"type": "GaussianFocalLoss", "alpha": 2.0, "gamma": 4.0, "loss_weight": 0.25}
LOSS_OFFSET = {"type": "SmoothL1Loss", "beta": 1 / 9, "loss_weight": 1.0}
FOREGROUND_WEIGHT = 0.1  # factor of `foreground_loss`
PRIOR = {"type": "Normal", "std": 0.01, "bias_prob": 0.01}
INIT = {
    "type": "Normal",
    "layer": "Conv2d",
    "std": 0.01,
    "override": [
        {**PRIOR, "name": name}
        for name in ("reppoints_cls_out", "foreground_out", "top_left_score", "bottom_right_score")
    ],
}


@TASK_UTILS.register_module()
class StrideATSSAssigner(ATSSAssigner):
    """ATSS that finds the level of each prior by its stride, a fifth column of the priors."""

    def assign(
        self,
        pred_instances: InstanceData,
        gt_instances: InstanceData,
        gt_instances_ignore: InstanceData | None = None,
    ) -> AssignResult:
        """See ATSSAssigner; `pred_instances.priors` is (N, 5), sorted by level."""
        strides = pred_instances.priors[:, 4]
        counts = torch.unique_consecutive(strides, return_counts=True)[1].tolist()
        return super().assign(pred_instances, counts, gt_instances, gt_instances_ignore)


class CornerFeatures(BiCornerPool):
    """CornerNet's pooling along two directions, with a last convolution of 1x1 as in the authors' release."""

    def __init__(
        self, channels: int, directions: Sequence[str], pooled_channels: int, norm_cfg: dict[str, Any]
    ) -> None:
        super().__init__(channels, list(directions), pooled_channels, channels, norm_cfg)
        self.conv2 = ConvModule(channels, channels, 1, norm_cfg=norm_cfg)


@MODELS.register_module()
class RepPointsV2Head(RepPointsHead):
    """RepPoints with corner and foreground verification, for MMDetection's RepPointsDetector.

    Args:
        num_classes: C, without background.
        in_channels: of the neck's maps.
        corner_channels: of the maps that corner pooling runs on.
        verifying_levels: for each level, the level whose corner maps its boxes are snapped to at inference,
            or -1 to leave them as regressed.
        init_cfg: initialization.
        options: those of RepPointsHead, except that those of FIXED have one value. MMDetection's
            QualityFocalLoss as `loss_cls` learns how well the refined boxes fit.

    Raises:
        ValueError: options that contradict each other or do not exist here.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        corner_channels: int = 64,
        verifying_levels: Sequence[int] = (REGRESSED_ONLY, 0, 0, 1, 1),
        init_cfg: dict[str, Any] = INIT,
        **options: Any,
    ) -> None:
        for name, value in FIXED.items():
            if options.setdefault(name, value) != value:
                raise ValueError(f"{name} must be {value!r} in RepPointsV2Head, got {options[name]!r}")
        self.corner_channels = corner_channels
        super().__init__(num_classes, in_channels, init_cfg=init_cfg, **options)
        levels = len(self.point_strides)
        if len(verifying_levels) != levels or not {*verifying_levels} <= {REGRESSED_ONLY, *range(levels)}:
            raise ValueError(
                f"verifying_levels must name, for each of {levels} levels, a level from 0 to {levels - 1} or "
                f"{REGRESSED_ONLY} for none, got {list(verifying_levels)}"
            )
        if isinstance(self.loss_cls, QualityFocalLoss) and (
            not self.use_sigmoid_cls or self.loss_cls.activated
        ):
            raise ValueError(
                "RepPointsV2Head gives QualityFocalLoss logits of one sigmoid per class: set "
                "use_sigmoid=True in loss_cls, and leave out activated"
            )
        self.verifiers = {
            level: verifier for level, verifier in enumerate(verifying_levels) if verifier != REGRESSED_ONLY
        }
        self.register_buffer("points_start", self._points_start(), persistent=False)
        self.loss_corner = MODELS.build(LOSS_CORNER)
        self.loss_corner_offset = MODELS.build(LOSS_OFFSET)

    def _init_layers(self) -> None:
        """RepPoints' layers, with more input channels for the corner maps, and the verification branches."""
        super()._init_layers()
        width = self.feat_channels
        for name in ("reppoints_cls_conv", "reppoints_pts_refine_conv"):
            old = getattr(self, name)
            wider = type(old)(width + CORNER_MAPS, self.point_feat_channels, self.dcn_kernel, 1, self.dcn_pad)
            setattr(self, name, wider)
        norm = self.norm_cfg
        self.shared_conv = ConvModule(width, width, 3, padding=1, norm_cfg=norm)
        self.foreground_out = nn.Conv2d(width, self.num_classes, 1)
        self.foreground_embedding = ConvModule(width, width, 1, norm_cfg=norm)
        self.top_left = CornerFeatures(width, ("top", "left"), self.corner_channels, norm)
        self.bottom_right = CornerFeatures(width, ("bottom", "right"), self.corner_channels, norm)
        self.top_left_score = nn.Conv2d(width, 1, 3, padding=1)
        self.top_left_offset = nn.Conv2d(width, 2, 3, padding=1)
        self.bottom_right_score = nn.Conv2d(width, 1, 3, padding=1)
        self.bottom_right_offset = nn.Conv2d(width, 2, 3, padding=1)

    def _points_start(self) -> Tensor:
        """(1, 2 * num_points, 1, 1), y before x in cells: a grid, its corners first."""
        grid = self.dcn_base_offset.float().view(-1, 2) / max(self.dcn_pad, 1) * (self.point_base_scale / 2)
        return torch.cat([grid[[0, -1]], grid[1:-1]]).view(1, -1, 1, 1)

    def points2bbox(self, pts: Tensor, y_first: bool = True) -> Tensor:
        """Points (N, 2 * num_points, ...) to boxes (N, 4, ...): left, top, right, bottom."""
        x, y = (1, 0) if y_first else (0, 1)
        start, end = pts[:, [x, y]], pts[:, [x + 2, y + 2]]
        return torch.cat([start.minimum(end), start.maximum(end)], dim=1)

    def forward_single(self, x: Tensor) -> tuple[Tensor, ...]:
        """All maps of one level.

        Args:
            x: (B, in_channels, H, W) map of the neck.

        Returns:
            class logits (B, C, H, W); first and refined points (B, 2 * num_points, H, W), y before x, in
            cells from their own; corner logits (B, 2, H, W) and offsets (B, 4, H, W) as in `LevelTargets`;
            foreground logits (B, C, H, W).
        """
        cls_feat = pts_feat = x
        for cls_conv, reg_conv in zip(self.cls_convs, self.reg_convs, strict=True):
            cls_feat, pts_feat = cls_conv(cls_feat), reg_conv(pts_feat)
        shared = self.shared_conv(pts_feat)
        foreground = self.foreground_out(shared)
        context = self.foreground_embedding(shared)
        corner_scores, corner_offsets = self._verify(shared + context)
        cls_feat, pts_feat = cls_feat + context, pts_feat + context

        points = self.reppoints_pts_init_out(self.relu(self.reppoints_pts_init_conv(pts_feat)))
        points = points + self.points_start.type_as(points)
        damped = points.detach().lerp(points, self.gradient_mul)
        sampling = damped - self.dcn_base_offset.type_as(points)
        corners = torch.cat([corner_scores, corner_offsets], dim=1)
        cls_feat = self.reppoints_cls_conv(torch.cat([cls_feat, corners], dim=1), sampling)
        pts_feat = self.reppoints_pts_refine_conv(torch.cat([pts_feat, corners], dim=1), sampling)
        scores = self.reppoints_cls_out(self.relu(cls_feat))
        refined = self.reppoints_pts_refine_out(self.relu(pts_feat)) + points.detach()
        return scores, points, refined, corner_scores, corner_offsets, foreground

    def _verify(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Corner logits (B, 2, H, W) and offsets (B, 4, H, W) of (B, feat_channels, H, W)."""
        top_left, bottom_right = self.top_left(features), self.bottom_right(features)
        scores = [self.top_left_score(top_left), self.bottom_right_score(bottom_right)]
        offsets = [self.top_left_offset(top_left), self.bottom_right_offset(bottom_right)]
        return torch.cat(scores, dim=1), torch.cat(offsets, dim=1)

    # --- Training -------------------------------------------------------------------------------------------

    def get_targets(self, proposals_list: list[list[Tensor]], *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """RepPointsHead's targets, for proposals that carry their stride as a last column."""
        strides = self.point_strides
        with_strides = [
            [pad(level, (0, 1), value=stride) for level, stride in zip(levels, strides, strict=True)]
            for levels in proposals_list
        ]
        return super().get_targets(with_strides, *args, **kwargs)

    def loss_by_feat(
        self,
        cls_scores: list[Tensor],
        points: list[Tensor],
        refined: list[Tensor],
        corner_scores: list[Tensor],
        corner_offsets: list[Tensor],
        foregrounds: list[Tensor],
        batch_gt_instances: list[InstanceData],
        batch_img_metas: list[dict[str, Any]],
        batch_gt_instances_ignore: list[InstanceData] | None = None,
    ) -> dict[str, Any]:
        """RepPoints' losses and those of verification, in float32; maps are those of `forward_single`."""
        cls_scores, points, refined, corner_scores, corner_offsets, foregrounds = (
            [level.float() for level in maps]
            for maps in (cls_scores, points, refined, corner_scores, corner_offsets, foregrounds)
        )
        losses = super().loss_by_feat(
            cls_scores, points, refined, batch_gt_instances, batch_img_metas, batch_gt_instances_ignore
        )
        sizes = [tuple(level.shape[-2:]) for level in cls_scores]
        targets = self.verification_targets(sizes, batch_gt_instances, batch_img_metas)
        corners = sum(level.is_corner.sum() for level in targets).clamp(min=1)
        losses["loss_corner"], losses["loss_corner_offset"] = multi_apply(
            self._corner_losses, corner_scores, corner_offsets, targets, average=corners
        )
        losses["loss_foreground"] = FOREGROUND_WEIGHT * foreground_loss(
            _flat(foregrounds),
            _flat([level.foreground for level in targets]),
            _flat([level.valid.expand_as(level.foreground) for level in targets]),
        )
        return losses

    def loss_by_feat_single(
        self,
        cls_score: Tensor,
        points: Tensor,
        refined: Tensor,
        labels: Tensor,
        label_weights: Tensor,
        first_truth: Tensor,
        first_weights: Tensor,
        truth: Tensor,
        weights: Tensor,
        stride: int,
        avg_factor_init: float,
        avg_factor_refine: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Class loss and the losses of first and refined boxes of one level, in units of its base scale.

        RepPointsHead's own, but for the target of a quality focal loss (Li et al., "Generalized Focal Loss",
        NeurIPS 2020, section 3): of a box's class, the overlap of the refined box with the true one.

        Args:
            cls_score: (B, C, H, W).
            points: (B, H * W, 2 * num_points), x before y, in pixels, like `refined`.
            labels: (B, H * W), C for background; `label_weights` alike.
            first_truth: (B, H * W, 4) in pixels, like `first_weights`, `truth` and `weights`; zeros where
                there is no box.
        """
        scale = self.point_base_scale * stride
        first, final = (self.points2bbox(part.flatten(0, 1), y_first=False) for part in (points, refined))
        truth, labels = truth.flatten(0, 1), labels.flatten()
        quality = bbox_overlaps(final.detach(), truth, is_aligned=True)
        target = (labels, quality) if isinstance(self.loss_cls, QualityFocalLoss) else labels
        scores = cls_score.flatten(2).transpose(1, 2).flatten(0, 1)  # B * H * W, C
        first_truth, first_weights = first_truth.flatten(0, 1), first_weights.flatten(0, 1)
        average = avg_factor_refine
        return (
            self.loss_cls(scores, target, label_weights.flatten(), avg_factor=average),
            self.loss_bbox_init(
                first / scale, first_truth / scale, first_weights, avg_factor=avg_factor_init
            ),
            self.loss_bbox_refine(final / scale, truth / scale, weights.flatten(0, 1), avg_factor=average),
        )

    def verification_targets(
        self,
        sizes: list[tuple[int, int]],
        batch_gt_instances: list[InstanceData],
        batch_img_metas: list[dict[str, Any]],
    ) -> list[LevelTargets]:
        """Targets of a batch, level by level, each part with a leading B.

        Args:
            sizes: (H, W) of the levels.
            batch_gt_instances: boxes and labels of each image.
            batch_img_metas: with each image's `pad_shape`.
        """
        targets = []
        for size, stride in zip(sizes, self.point_strides, strict=True):
            strides = (stride, self.point_strides[0])
            images = [
                level_targets(
                    *(truth.bboxes, truth.labels, self.num_classes),
                    *(size, meta["pad_shape"][:2], strides),
                )
                for truth, meta in zip(batch_gt_instances, batch_img_metas, strict=True)
            ]
            targets.append(LevelTargets(*map(torch.stack, zip(*images, strict=True))))
        return targets

    def _corner_losses(
        self, scores: Tensor, offsets: Tensor, targets: LevelTargets, average: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Heatmap and offset loss of one level; `average` is the number of corners in the batch."""
        heatmap = self.loss_corner(
            scores.sigmoid(), targets.heatmap, weight=targets.valid.expand_as(scores), avg_factor=average
        )
        weight = targets.is_corner.repeat_interleave(2, dim=1).float()
        offset = self.loss_corner_offset(offsets, targets.offsets, weight=weight, avg_factor=average)
        return heatmap, offset

    # --- Inference ------------------------------------------------------------------------------------------

    def predict_by_feat(
        self,
        cls_scores: list[Tensor],
        points: list[Tensor],
        refined: list[Tensor],
        corner_scores: list[Tensor],
        corner_offsets: list[Tensor],
        foregrounds: list[Tensor],
        batch_img_metas: list[dict[str, Any]],
        **options: Any,
    ) -> list[InstanceData]:
        """Boxes of each image from the maps of `forward_single`; `options` as for any dense head."""
        regressed = [self.points2bbox(level.float()) for level in refined]
        boxes = self.joint_boxes(regressed, corner_scores, corner_offsets, batch_img_metas)
        return super().predict_by_feat(
            [level.float() for level in cls_scores], boxes, batch_img_metas=batch_img_metas, **options
        )

    def joint_boxes(
        self,
        regressed: list[Tensor],
        corner_scores: list[Tensor],
        corner_offsets: list[Tensor],
        batch_img_metas: list[dict[str, Any]],
    ) -> list[Tensor]:
        """Regressed boxes with both corners replaced by the best verified ones around them.

        Args:
            regressed: (B, 4, H, W) of each level, in its cells from the cell's own point.
            corner_scores: (B, 2, H, W) of each level.
            corner_offsets: (B, 4, H, W) of each level.
            batch_img_metas: with each image's `img_shape`, to which regressed corners are clipped.

        Returns:
            Boxes in the same form.
        """
        ends = regressed[0].new_tensor([meta["img_shape"][1::-1] for meta in batch_img_metas])  # B, (x, y)
        sizes = [level.shape[-2:] for level in regressed]
        cells = self.prior_generator.grid_priors(sizes, regressed[0].dtype, regressed[0].device)
        joint = list(regressed)
        for level, verifier in self.verifiers.items():
            stride = self.point_strides[level]
            corners = regressed[level].unflatten(1, (2, 2)).flatten(3).transpose(2, 3)  # B, 2, H * W, (x, y)
            corners = (corners * stride + cells[level]).clamp(min=0).minimum(ends[:, None, None])
            scores = corner_scores[verifier].float().unbind(dim=1)
            offsets = corner_offsets[verifier].float().chunk(2, dim=1)
            snapped = [
                snap_to_corners(*kind, self.point_strides[verifier])
                for kind in zip(corners.unbind(dim=1), scores, offsets, strict=True)
            ]
            moved = (torch.stack(snapped, dim=1) - cells[level]) / stride
            joint[level] = moved.transpose(2, 3).reshape(regressed[level].shape)
        return joint


def foreground_loss(logits: Tensor, weights: Tensor, valid: Tensor) -> Tensor:
    """Focal loss of foreground maps, a scalar: gamma is 2, alpha 0.25. Every box counts equally.

    The paper's normalized focal loss: the loss of positive cells is weighted by `LevelTargets.foreground` and
    divided by the sum of these weights; the loss of negative cells is divided by the number of positive ones.

    Args:
        logits: of any shape, float32.
        weights: of that shape, those of the targets.
        valid: bool, of that shape; other cells are ignored.
    """
    positive = weights > 0
    negative = valid & ~positive
    hit = -logsigmoid(logits) * (-logits).sigmoid().square() * weights
    false_alarm = -logsigmoid(-logits) * logits.sigmoid().square() * negative
    hits = hit.sum() / weights.sum().clamp(min=torch.finfo(logits.dtype).tiny)
    false_alarms = false_alarm.sum() / positive.sum().clamp(min=1)
    return 0.25 * hits + 0.75 * false_alarms


def _flat(maps: list[Tensor]) -> Tensor:
    """Flatten and concatenate maps of different sizes."""
    return torch.cat([level.flatten() for level in maps])
