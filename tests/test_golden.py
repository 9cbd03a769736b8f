"""Parity with the original release on 38 recorded runs: nine shipped models and one variant for every
option.

The fused kernels run all of them on a GPU. Elsewhere test_triton.py runs them in the interpreter, for a model
of each family; all take less than an hour:

    ALL_GOLDENS=1 TRITON_INTERPRET=1 python -m pytest tests/test_golden.py -k kernels
"""

import json
import os
from itertools import product
from pathlib import Path

import pytest
import torch
from golden_files import ALL, FILES, SMALL, Golden, relative

from models import load_checkpoint

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
FEW = [path for path in FILES if path.stem in ("v1_shift", "v2_shift")]
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-9}
RUNS = [(torch.float64, "plain"), (torch.float32, "cpu")]
if ALL:
    RUNS = [*product(TOLERANCE, ("plain", "cpu"))]


def test_all_recordings_are_here() -> None:
    assert len(FILES) == 38 and len(SMALL) == 29


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_same_results_as_the_original(path) -> None:
    """Names and shapes in the state, logits, maps of all stages, and gradients."""
    golden = Golden(path)
    model = golden.build().train()
    same_names(golden, model.state_dict())
    assert sum(p.numel() for p in model.parameters()) == golden.data["num_params"]
    image = golden.input()
    cotangent = golden.tensor("cotangent", golden.data["logits"].shape)
    large = path not in SMALL
    for dtype, backend in RUNS:
        model.to(dtype)
        for module in model.modules():
            if hasattr(module, "backend"):
                module.backend = backend
        trains = ALL or not (large and dtype == torch.float64)
        with torch.set_grad_enabled(trains):
            last, maps = model.forward_intermediates(image.to(dtype))
            logits = model.forward_head(last)
            assert large or torch.equal(model(image.to(dtype)), logits)
        golden.check_forward(logits, [x.detach() for x in maps], TOLERANCE[dtype])
        if trains:
            model.zero_grad()
            logits.backward(cotangent.to(dtype))
            golden.check_gradients(model, 1e-8 if dtype == torch.float64 else 1e-3 if large else 1e-4)


def same_names(golden: Golden, state: dict[str, torch.Tensor]) -> None:
    """Everything we keep has the original's name and shape; what we leave out are tables it can recompute."""
    shapes = dict(zip(golden.names("state_names"), golden.names("state_shapes"), strict=True))
    assert {name: json.dumps(list(value.shape)) for name, value in state.items()} == {
        name: shape for name, shape in shapes.items() if name in state
    }
    left_out = shapes.keys() - state.keys()
    assert left_out <= set(golden.names("buffer_names"))
    assert not any("topk_cloest_indice" in name for name in left_out)


@pytest.mark.parametrize("path", SMALL, ids=lambda path: path.stem)
def test_what_the_original_saves_loads(path: Path, tmp_path: Path) -> None:
    """With its tables, of which ours are made anew."""
    golden = Golden(path)
    model = golden.build()
    own = model.state_dict()
    state = {name: own.get(name, torch.zeros(2)) for name in golden.names("state_names")}
    model.load_state_dict(state)
    torch.save({"model": state}, tmp_path / "original.pth")
    load_checkpoint(model, tmp_path / "original.pth")


@pytest.mark.parametrize(("name", "img_size"), [("v1_nonsquare", 76), ("v1_pad", [84, 112])])
def test_other_size_equals_the_original_built_at_that_size(name, img_size) -> None:
    golden = Golden(next(path for path in FILES if path.stem == name))
    model = golden.build(img_size=img_size).eval()
    with torch.no_grad():
        maps = model.forward_intermediates(golden.input(), intermediates_only=True)
        golden.check_forward(model(golden.input()), maps, 1e-9)


@pytest.mark.skipif(
    not (INTERPRETED or HAS_GPU), reason="needs a GPU that runs the kernels, or the interpreter"
)
@pytest.mark.parametrize("path", FEW if INTERPRETED and not ALL else FILES, ids=lambda path: path.stem)
def test_kernels_give_the_same_results(path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and gradients in float32. In the interpreter shipped models answer one image, without gradients;
    so does Focal but in the long run of all."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    golden, device = Golden(path), "cpu" if INTERPRETED else "cuda"
    model = golden.build(attention_backend="triton").float().train().to(device)
    images, expected = golden.input().float().to(device), torch.from_numpy(golden.data["logits"])
    if INTERPRETED and (path not in SMALL or (golden.kind == "focal" and not ALL)):
        with torch.no_grad():
            assert relative(model(images[:1]).cpu(), expected[:1]) < 5e-6
        return
    logits = model(images)
    assert relative(logits.cpu(), expected) < 5e-6
    logits.backward(golden.tensor("cotangent", expected.shape).float().to(device))
    golden.check_gradients(model.cpu(), 1e-4, floor=1e-2)  # for sums that rounding in float32 spoils
