"""Random streams of the data pipeline.

Every random decision draws from a seed derived from the run's seed, the stream's name and a position (epoch,
index, rank), so that it depends on nothing else: not on the number of workers, their start method, or
what was drawn before.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch

_NUMPY_GENERATOR = np.random.MT19937(0)
"""Of the body of `seeded_rngs`."""


class Stream(IntEnum):
    """Which random decision a seed is for; different streams never share a seed."""

    SHUFFLE = 0
    AUGMENT = 1
    REPLACE = 2


def derive_seed(seed: int, stream: Stream, *position: int) -> int:
    """Mix the run's seed, a stream and a position (non-negative integers) into a seed in [0, 2**63)."""
    sequence = np.random.SeedSequence([seed, int(stream), *position])
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1


@contextmanager
def seeded_rngs(seed: int) -> Iterator[None]:
    """Run the body with Python's, numpy's and torch's CPU generators seeded, then restore their states.

    Restoring keeps loading without workers from disturbing the random numbers of the model. Calls must not
    nest. numpy's global generator is replaced meanwhile, which is faster than saving and restoring its state.
    """
    python_state, torch_state = random.getstate(), torch.default_generator.get_state()
    numpy_generator = np.random.get_bit_generator()
    try:
        random.seed(seed)
        np.random.set_bit_generator(_NUMPY_GENERATOR)
        np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed every accelerator
        yield
    finally:
        random.setstate(python_state)
        np.random.set_bit_generator(numpy_generator)
        torch.default_generator.set_state(torch_state)
