"""models/ copied elsewhere: its focal_transformer.py alone is the network, two copies of the folder work side
by side, and one is a backbone of torchvision's detectors, as detection/get_started.md prints it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from conftest import REPO
from golden_files import normal

ONE_FILE = """
import importlib.util, json, sys
from collections import OrderedDict
import torch
spec = importlib.util.spec_from_file_location("network", sys.argv[1] + "/focal_transformer.py")
network = importlib.util.module_from_spec(spec)
spec.loader.exec_module(network)  # without an entry in sys.modules
FocalTransformer = network.FocalTransformer
assert [*network.BACKENDS] == ["plain"] and "models" not in sys.modules
for version in ("v1", "v2"):
    model = FocalTransformer(**json.load(open(version + ".json")))
    with torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode")]):
        state = torch.load(version + ".pth", weights_only=True)["model"]
    assert state.keys() > model.state_dict().keys()
    model.load_state_dict(state)
    images, logits = torch.load(version + ".pt")
    with torch.no_grad():
        assert (model.eval()(images) - logits).abs().max() < 1e-5
    model.train()(images[:, :, :100, :130]).square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
"""

TWO_COPIES = """
import torch, first.models, second.models
options = dict(img_size=64, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), focal_pool="fc",
               drop_path_rate=0.0, focal_levels=(2, 2, 2, 2), focal_windows=(3, 1, 1, 1))
made = [package.models.FocalTransformer(**options).train() for package in (first, second)]
made[1].load_state_dict(made[0].state_dict())
images = torch.rand(2, 3, 64, 64)
outs = [model(images) for model in made]
for out in reversed(outs):
    out.square().sum().backward()
assert torch.equal(*outs)
for a, b in zip(made[0].parameters(), made[1].parameters()):
    assert torch.equal(a.grad, b.grad)
"""

DETECTORS = """
import torch
torch.manual_seed(0)
boxes = torch.tensor([[10.0, 12, 60, 70], [40, 30, 90, 110]])
masks = torch.zeros(2, 128, 160, dtype=torch.uint8)
masks[0, 12:70, 10:60] = masks[1, 30:110, 40:90] = 1
images = [torch.rand(3, 128, 160), torch.rand(3, 100, 130)]
target = {"boxes": boxes, "labels": torch.tensor([1, 7]), "masks": masks}
targets = [target, {**target, "masks": masks[:, :100, :130]}]
for detector in (mask_rcnn, retinanet):
    detector.transform.min_size, detector.transform.max_size = (128,), 200
    losses = detector.train()(images, targets)
    sum(losses.values()).backward()
    without = [name for name, p in detector.named_parameters() if p.grad is None]
    assert not without, without
    assert all(torch.isfinite(p.grad).all() for p in detector.parameters())
    detector.eval().score_thresh = 0.0
    if detector is mask_rcnn:
        detector.roi_heads.score_thresh = 0.0
    with torch.no_grad():
        found = detector(images)
    assert len(found) == 2 and all(len(one["boxes"]) > 0 for one in found)
    assert found[1]["boxes"][:, 2].max() <= 130 and found[1]["boxes"][:, 3].max() <= 100
    assert ("masks" in found[0]) == (detector is mask_rcnn)
import models
assert models.__file__.startswith(sys.argv[1])
"""

WITHOUT_TRITON = """
from models.focal_transformer import BACKENDS, Request
assert "models.ops.triton.kernels" not in sys.modules  # it is imported when it is needed
sys.modules["triton"] = None
try:
    BACKENDS["triton"].prepare(None, Request("triton", torch.device("cuda"), torch.float32, 2, 32, True))
    raise AssertionError
except ValueError as error:
    assert "needs the package triton" in str(error), error
"""


def test_copies_work_elsewhere(tmp_path: Path) -> None:
    """In one process where nothing of this project is at hand but the copies.

    The file alone with weights of the original; a training step reaches every parameter. PyTorch knows
    operators by name, and a second copy of the folder must not take the first one's away. The detectors are
    trained for a step, and detect, with few channels; they import the third copy.
    """
    for version in ("v1", "v2"):
        official = REPO / f"tests/checkpoints/official_{version}_nano"
        given = json.loads(official.with_suffix(".yaml").read_text())["MODEL"]
        options = {key.lower(): value for key, value in (given | given["FOCAL"]).items()}
        options["kind"] = options.pop("type")
        options = {key: value for key, value in options.items() if key not in ("name", "focal")}
        (tmp_path / f"{version}.json").write_text(json.dumps(options))
        expected = np.load(f"{official}_expected.npz")
        images = normal(str(expected["input_salt"]) + "input", (2, 3, 224, 224))
        pair = torch.from_numpy(images).float(), torch.from_numpy(expected["logits"])
        torch.save(pair, tmp_path / f"{version}.pt")
        shutil.copy(official.with_suffix(".pth"), tmp_path / f"{version}.pth")
    shutil.copy(REPO / "models/focal_transformer.py", tmp_path)
    for folder in ("first/models", "second/models", "models"):
        shutil.copytree(REPO / "models", tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    pages = (REPO / "detection/get_started.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", pages, re.M | re.S)
    (printed,) = [block for block in blocks if "class FocalFPN" in block]
    small = printed.replace("depths=(2, 2, 6, 2)", "depths=(1, 1, 1, 1), embed_dim=24")
    assert small != printed
    (tmp_path / "copies.py").write_text(ONE_FILE + TWO_COPIES + small + DETECTORS + WITHOUT_TRITON)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "copies.py", str(tmp_path)],
        cwd=tmp_path,
        env=environment | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
