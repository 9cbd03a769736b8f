"""The fused kernels in whole models, against what the original answered for every option.

On a GPU all files run. Elsewhere this file, as test_triton.py, runs itself once more with TRITON_INTERPRET=1,
for the small models: the interpreter takes hours for all, the released ones with their gradients among them:

    ALL_GOLDENS=1 TRITON_INTERPRET=1 python -m pytest tests/test_triton_golden.py
"""

import os

import pytest
import torch
from golden_files import FILES, SMALL, Golden, relative
from test_triton import INTERPRETED, compiled, run_in_interpreter

DEVICE = "cpu" if INTERPRETED else "cuda"
ALL = not INTERPRETED or os.environ.get("ALL_GOLDENS") == "1"
FEW = [path for path in SMALL if path.stem in ("v1_default", "v1_shift", "v2_default")]
HAS_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
kernels_run = pytest.mark.skipif(
    not (INTERPRETED or HAS_GPU), reason="needs a GPU that runs the kernels, or runs in that subprocess"
)


@compiled
def test_in_interpreter() -> None:
    """All tests of this file."""
    run_in_interpreter(__file__)


def build(golden: Golden) -> torch.nn.Module:
    """In float32, training, with the fused kernels in every block."""
    return golden.build(attention_backend="triton").float().train().to(DEVICE)


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU those of float32 are not by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@kernels_run
@pytest.mark.parametrize("path", FILES if ALL else SMALL, ids=lambda path: path.stem)
def test_same_logits_as_the_original(path) -> None:
    """Of the first image."""
    golden = Golden(path)
    with torch.no_grad():
        logits = build(golden)(golden.input().float()[:1].to(DEVICE))
    assert relative(logits.cpu(), torch.from_numpy(golden.data["logits"][:1])) < 5e-6


@kernels_run
@pytest.mark.parametrize("path", FILES if ALL else FEW, ids=lambda path: path.stem)
def test_same_gradients_as_the_original(path) -> None:
    golden = Golden(path)
    model = build(golden)
    logits = model(golden.input().float().to(DEVICE))
    logits.backward(golden.tensor("cotangent", golden.data["logits"].shape).float().to(DEVICE))
    golden.check_gradients(model.cpu(), 1e-4, floor=1e-2)  # for sums that rounding in float32 spoils
