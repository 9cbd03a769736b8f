"""The loss of RepPoints v2's foreground maps. Importing this module registers it."""

import torch
from mmdet.registry import MODELS
from torch import Tensor, nn
from torch.nn.functional import logsigmoid


@MODELS.register_module()
class BoxNormalizedFocalLoss(nn.Module):
    """Focal loss of foreground maps in which every box counts equally, whatever its size.

    The paper's normalized focal loss: the loss of positive cells is weighted by `LevelTargets.foreground` and
    divided by the sum of these weights; the loss of negative cells is divided by the number of positive ones.

    Args:
        gamma: exponent; larger values reduce the loss of well classified cells.
        alpha: weight of the positive cells; negative ones have 1 - alpha.
        loss_weight: factor of the result.
    """

    def __init__(self, gamma: float = 2.0, alpha: float = 0.25, loss_weight: float = 0.1) -> None:
        super().__init__()
        self.gamma = gamma
        self.alpha = alpha
        self.loss_weight = loss_weight

    def forward(self, logits: Tensor, weights: Tensor, valid: Tensor) -> Tensor:
        """The loss, a scalar. Logits, weights and valid (bool) have one shape; invalid cells are ignored."""
        logits = logits.float()
        positive = weights > 0
        negative = valid & ~positive
        hit = -logsigmoid(logits) * (-logits).sigmoid().pow(self.gamma) * weights
        false_alarm = -logsigmoid(-logits) * logits.sigmoid().pow(self.gamma) * negative
        hits = hit.sum() / weights.sum().clamp(min=torch.finfo(logits.dtype).tiny)
        false_alarms = false_alarm.sum() / positive.sum().clamp(min=1)
        return self.loss_weight * (self.alpha * hits + (1 - self.alpha) * false_alarms)
