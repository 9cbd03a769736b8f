"""Parity with the original release on 38 recorded runs: nine shipped models and one variant for every
option."""

import json
from itertools import product

import pytest
import torch
from golden_files import ALL, FILES, SMALL, Golden

TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-9}


def test_all_recordings_are_here() -> None:
    assert len(FILES) == 38 and len(SMALL) == 29


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_same_results_as_the_original(path) -> None:
    golden = Golden(path)
    model = golden.build().train()
    assert sum(p.numel() for p in model.parameters()) == golden.data["num_params"]
    image = golden.input()
    cotangent = golden.tensor("cotangent", golden.data["logits"].shape)
    large = path not in SMALL
    runs = [*product((torch.float64, torch.float32), ("plain", "cpu"))]
    for dtype, backend in [(torch.float64, "plain"), (torch.float32, "cpu")] if large and not ALL else runs:
        model.to(dtype)
        for module in model.modules():
            if hasattr(module, "backend"):
                module.backend = backend
        logits = model(image.to(dtype))
        with torch.no_grad():
            maps = model.forward_intermediates(image.to(dtype), intermediates_only=True)
        golden.check_forward(logits, maps, TOLERANCE[dtype])
        if large and dtype == torch.float64 and not ALL:
            continue
        model.zero_grad()
        logits.backward(cotangent.to(dtype))
        golden.check_gradients(model, 1e-8 if dtype == torch.float64 else 1e-3 if large else 1e-4)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_state_has_the_originals_names(path) -> None:
    """Everything we keep has the original's name and shape; what we leave out are tables it can recompute."""
    golden = Golden(path)
    shapes = dict(zip(golden.names("state_names"), golden.names("state_shapes"), strict=True))
    with torch.device("meta"):
        from models import FocalTransformer

        state = FocalTransformer(kind=golden.kind, **golden.options).state_dict()
    assert {name: json.dumps(list(value.shape)) for name, value in state.items()} == {
        name: shape for name, shape in shapes.items() if name in state
    }
    left_out = shapes.keys() - state.keys()
    assert left_out <= set(golden.names("buffer_names"))
    assert not any("topk_cloest_indice" in name for name in left_out)


@pytest.mark.parametrize(("name", "img_size"), [("v1_nonsquare", 76), ("v1_pad", [84, 112])])
def test_other_size_equals_the_original_built_at_that_size(name, img_size) -> None:
    golden = Golden(next(path for path in FILES if path.stem == name))
    model = golden.build(img_size=img_size).eval()
    with torch.no_grad():
        maps = model.forward_intermediates(golden.input(), intermediates_only=True)
        golden.check_forward(model(golden.input()), maps, 1e-9)
