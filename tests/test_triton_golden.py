"""The fused kernels in whole models, against what the original answered.

On a GPU with all files. Elsewhere test_triton.py runs this file in the interpreter, for a model of each
family; all of them take hours:

    ALL_GOLDENS=1 TRITON_INTERPRET=1 python -m pytest tests/test_triton_golden.py
"""

import pytest
import torch
from golden_files import ALL, FILES, Golden, relative
from test_triton import INTERPRETED

HAS_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
FEW = [path for path in FILES if path.stem in ("v1_shift", "v2_shift")]
kernels_run = pytest.mark.skipif(
    not (INTERPRETED or HAS_GPU), reason="needs a GPU that runs the kernels, or runs in that subprocess"
)


@kernels_run
@pytest.mark.parametrize("path", FEW if INTERPRETED and not ALL else FILES, ids=lambda path: path.stem)
def test_same_results_as_the_original(path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and gradients in float32; in the interpreter Focal answers one image, without gradients."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    golden, device = Golden(path), "cpu" if INTERPRETED else "cuda"
    model = golden.build(attention_backend="triton").float().train().to(device)
    images, expected = golden.input().float().to(device), torch.from_numpy(golden.data["logits"])
    if INTERPRETED and not ALL and golden.kind == "focal":
        with torch.no_grad():
            assert relative(model(images[:1]).cpu(), expected[:1]) < 5e-6
        return
    logits = model(images)
    assert relative(logits.cpu(), expected) < 5e-6
    logits.backward(golden.tensor("cotangent", expected.shape).float().to(device))
    golden.check_gradients(model.cpu(), 1e-4, floor=1e-2)  # for sums that rounding in float32 spoils
