"""Random streams of the data pipeline.

Every random decision draws from a seed derived from the run's seed, the stream's number and a position
(epoch, index, rank), so that it depends on nothing else: not on the number of workers, their start method,
or what was drawn before.
"""

import random

import numpy as np
import torch

SHUFFLE, AUGMENT, REPLACE = range(3)
"""Streams: which random decision a seed is for. Different streams never share a seed."""


def derive_seed(seed: int, stream: int, *position: int) -> int:
    """Mix the run's seed, a stream and a position (non-negative integers) into a seed in [0, 2**63)."""
    sequence = np.random.SeedSequence([seed, stream, *position])
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1


def seed_transforms(seed: int) -> None:
    """Seed the generators that transforms draw from: Python's, numpy's and torch's on the CPU.

    `torch.manual_seed` would also seed every accelerator, which takes long.
    """
    random.seed(seed)
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
    torch.default_generator.manual_seed(seed)
