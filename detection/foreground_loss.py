"""The loss of RepPoints v2's foreground maps, registered by being imported."""

import torch
from mmdet.registry import MODELS
from torch import Tensor, nn
from torch.nn.functional import logsigmoid


@MODELS.register_module()
class BoxNormalizedFocalLoss(nn.Module):
    """Focal loss of foreground maps in which every box counts alike, whatever its size.

    The paper's normalized focal loss: positive cells weigh as `LevelTargets.foreground` says and are divided
    by the sum of these weights; negative cells by the number of positive ones.

    Args:
        gamma: how strongly well classified cells are played down.
        alpha: share of the positive cells' part.
        loss_weight: factor of the result.
    """

    def __init__(self, gamma: float = 2.0, alpha: float = 0.25, loss_weight: float = 0.1) -> None:
        super().__init__()
        self.gamma = gamma
        self.alpha = alpha
        self.loss_weight = loss_weight

    def forward(self, logits: Tensor, weights: Tensor, valid: Tensor) -> Tensor:
        """A scalar of logits, weights and valid (bool) of one shape; what is not valid does not count."""
        logits = logits.float()
        positive = weights > 0
        negative = valid & ~positive
        hit = -logsigmoid(logits) * (-logits).sigmoid().pow(self.gamma) * weights
        false_alarm = -logsigmoid(-logits) * logits.sigmoid().pow(self.gamma) * negative
        hits = hit.sum() / weights.sum().clamp(min=torch.finfo(logits.dtype).tiny)
        false_alarms = false_alarm.sum() / positive.sum().clamp(min=1)
        return self.loss_weight * (self.alpha * hits + (1 - self.alpha) * false_alarms)
