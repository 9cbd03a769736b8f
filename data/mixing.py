"""Mixup and CutMix through timm, with random numbers that depend only on the position in training."""

from collections.abc import Sequence

import torch
from timm.data import Mixup

from data.seeding import Stream, derive_seed, seeded_rngs


class SeededMixup:
    """timm's Mixup, drawing from (seed, epoch, step, rank) at every call.

    Call `set_position(epoch, step)` before the first batch of an epoch, or of a resumed one. Each call then
    moves on by one step, so calling `set_position` again before every batch is allowed but not needed.
    """

    def __init__(
        self,
        mixup: float,
        cutmix: float,
        cutmix_minmax: Sequence[float] | None,
        prob: float,
        switch_prob: float,
        mode: str,
        label_smoothing: float,
        num_classes: int,
        seed: int,
        rank: int,
    ) -> None:
        """
        Args:
            mixup: alpha of Mixup; 0 switches it off.
            cutmix: alpha of CutMix; 0 switches it off unless `cutmix_minmax` is given.
            cutmix_minmax: (low, high) share of the image that CutMix pastes, instead of `cutmix`.
            prob: probability of mixing at all.
            switch_prob: probability of CutMix where both are on.
            mode: one draw per "batch", "pair" or "elem".
            label_smoothing: share of every target spread over all classes.
            num_classes: width of the targets.
            seed: the run's seed.
            rank: of this process.
        """
        self._mixup = Mixup(
            mixup_alpha=mixup,
            cutmix_alpha=cutmix,
            cutmix_minmax=cutmix_minmax,
            prob=prob,
            switch_prob=switch_prob,
            mode=mode,
            label_smoothing=label_smoothing,
            num_classes=num_classes,
        )
        self._seed = seed
        self._rank = rank
        self._epoch = 0
        self._step = 0

    def set_position(self, epoch: int, step: int) -> None:
        """Say which batch the next call is for: `step` counts the batches of `epoch`, from 0."""
        self._epoch = epoch
        self._step = step

    def __call__(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix a batch, and move on to the next step.

        Args:
            images: (B, C, H, W), B even; changed in place.
            targets: (B,) class indices.

        Returns:
            The images, and soft targets (B, num_classes).
        """
        with seeded_rngs(derive_seed(self._seed, Stream.MIXUP, self._epoch, self._step, self._rank)):
            self._step += 1
            return self._mixup(images, targets)


def build_mixup(
    mixup: float,
    cutmix: float,
    cutmix_minmax: Sequence[float] | None,
    prob: float,
    switch_prob: float,
    mode: str,
    label_smoothing: float,
    num_classes: int,
    batch_size: int,
    seed: int,
    rank: int,
) -> SeededMixup | None:
    """`SeededMixup`, or None where Mixup and CutMix are both off.

    Args:
        mixup, cutmix, cutmix_minmax, prob, switch_prob, mode, label_smoothing, num_classes, seed, rank: see
        `SeededMixup`.
        batch_size: images per process and step.

    Raises:
        ValueError: the batch size is odd, the mode unknown, or the range of CutMix is not a range.
    """
    if not (mixup > 0 or cutmix > 0 or cutmix_minmax):
        return None
    if batch_size % 2:
        raise ValueError(
            "DATA.BATCH_SIZE: expected an even number with Mixup or CutMix, which mix pairs, got "
            f"{batch_size}; change it by "
            "one or set AUG.MIXUP and AUG.CUTMIX to 0"
        )
    if mode not in ("batch", "pair", "elem"):
        raise ValueError(f"AUG.MIXUP_MODE: expected one of batch, pair, elem, got {mode!r}; choose one")
    if cutmix_minmax and not (len(cutmix_minmax) == 2 and 0 <= cutmix_minmax[0] < cutmix_minmax[1] <= 1):
        raise ValueError(
            f"AUG.CUTMIX_MINMAX: expected [low, high] with 0 <= low < high <= 1, got {list(cutmix_minmax)}; "
            "correct it"
        )
    return SeededMixup(
        mixup,
        cutmix,
        cutmix_minmax or None,
        prob,
        switch_prob,
        mode,
        label_smoothing,
        num_classes,
        seed,
        rank,
    )
