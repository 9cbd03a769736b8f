"""Mixup and CutMix through timm, with random numbers that depend only on the position in training."""

import torch
from timm.data import Mixup

from data.seeding import Stream, derive_seed, seeded_rngs


class SeededMixup:
    """timm's Mixup, drawing from (seed, epoch, step, rank) at every call.

    Call `set_position` before the first batch of an epoch; each call then advances by one step.
    """

    def __init__(self, mixup: Mixup, seed: int, rank: int) -> None:
        self._mixup = mixup
        self._seed = seed
        self._rank = rank
        self.set_position(0, 0)

    def set_position(self, epoch: int, step: int) -> None:
        """Set the batch that the next call is for: `step` counts the batches of `epoch`, from 0."""
        self._epoch = epoch
        self._step = step

    def __call__(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix a batch, and advance to the next step.

        Args:
            images: [B, C, H, W], B even; changed in place.
            targets: [B] class indices.

        Returns:
            The images, and soft targets [B, num_classes].
        """
        with seeded_rngs(derive_seed(self._seed, Stream.MIXUP, self._epoch, self._step, self._rank)):
            self._step += 1
            return self._mixup(images, targets)
