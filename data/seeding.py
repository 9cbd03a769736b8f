"""Random streams of the data pipeline.

Every random decision draws from a seed derived from the run's seed, the stream's number and a position
(epoch, index, rank), so that it depends on nothing else: not on the number of workers, their start method,
or what was drawn before.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

SHUFFLE, AUGMENT, REPLACE = range(3)
"""Streams: which random decision a seed is for. Different streams never share a seed."""


def derive_seed(seed: int, stream: int, *position: int) -> int:
    """Mix the run's seed, a stream and a position (non-negative integers) into a seed in [0, 2**63)."""
    sequence = np.random.SeedSequence([seed, stream, *position])
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1


@contextmanager
def seeded_rngs(seed: int) -> Iterator[None]:
    """Run the body with Python's, numpy's and torch's CPU generators seeded, then restore their states.

    Restoring keeps loading without workers from changing the random numbers of the model.
    """
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        random.seed(seed)
        np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed every accelerator
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
