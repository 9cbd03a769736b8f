"""The fused kernels in whole models, against what the original answered for every option.

As test_triton.py, this file runs itself once more with TRITON_INTERPRET=1.
"""

import pytest
import torch
from golden_files import FOLDER, SMALL, Golden, relative
from test_triton import compiled, interpreted, run_in_interpreter


@compiled
def test_in_interpreter() -> None:
    """All tests of this file."""
    run_in_interpreter(__file__)


def build(golden: Golden) -> torch.nn.Module:
    """In float32, training, with the fused kernels in every block."""
    return golden.build(attention_backend="triton").float().train()


@interpreted
@pytest.mark.parametrize("path", SMALL, ids=lambda path: path.stem)
def test_same_logits_as_the_original(path) -> None:
    """Of the first image."""
    golden = Golden(path)
    with torch.no_grad():
        logits = build(golden)(golden.input().float()[:1])
    assert relative(logits, torch.from_numpy(golden.data["logits"][:1])) < 5e-6


@interpreted
@pytest.mark.parametrize("name", ["v1_default", "v1_shift", "v2_default"])
def test_same_gradients_as_the_original(name: str) -> None:
    golden = Golden(FOLDER / f"{name}.npz")
    model = build(golden)
    logits = model(golden.input().float())
    logits.backward(golden.tensor("cotangent", golden.data["logits"].shape).float())
    golden.check_gradients(model, 1e-4)
