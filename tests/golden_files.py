"""The original's results (tests/golden): how to build the same model, weights and input again.

Weights are not stored, they follow from the parameter names. Every number comes from a normal generator
seeded with the CRC-32 of a text.
"""

import json
import os
import zlib
from pathlib import Path

import numpy as np
import torch

from models import FocalTransformer

FOLDER = Path(__file__).parent / "golden"
FILES = sorted(FOLDER.glob("*.npz"))
SMALL = [file for file in FILES if file.stem.startswith(("v1_", "v2_"))]
ALL = os.environ.get("ALL_GOLDENS") == "1"
"""Every file with every operator and type of numbers; takes an hour, in Triton's interpreter another."""


def normal(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers that belong to a text."""
    return np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)


def weight(name: str, shape: tuple[int, ...], salt: str) -> np.ndarray:
    """The value of a parameter in the original's run."""
    x = normal(salt + name, shape)
    if "bias_table" in name:
        return 0.5 * x
    if name.endswith("absolute_pos_embed"):
        return 0.1 * x
    if ".gamma_" in name:
        return 0.5 + 0.1 * x
    if name.endswith(".bias"):
        return 0.1 * x
    return 1 + 0.1 * x if len(shape) == 1 else x / np.sqrt(np.prod(shape[1:]))


class Golden:
    """One file: what the original was asked and what it answered."""

    def __init__(self, path: Path) -> None:
        self.data = np.load(path)
        meta = json.loads(str(self.data["meta"]))
        self.kind, self.salt, self.batch = meta["kind"], meta["salt"], meta["batch"]
        self.options = {key: value for key, value in meta["kwargs"].items() if key != "expand_stages"}
        if "focal_topK" in self.options:
            self.options["focal_topk"] = self.options.pop("focal_topK")

    def build(self, **changes: object) -> FocalTransformer:
        """The model in float64 with the original's weights and, at the same size, its choice of nearest
        keys."""
        model = FocalTransformer(kind=self.kind, **{**self.options, **changes}).double()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.from_numpy(weight(name, tuple(parameter.shape), self.salt)))
            if "img_size" not in changes:
                names = [name for name, _ in model.named_buffers()]
                choice = {
                    name: torch.from_numpy(self.data[f"buffer.{name}"].astype(np.int64)) for name in names
                }
                model.load_state_dict(choice, strict=False)
        return model

    def input(self) -> torch.Tensor:
        """The original's input, float64."""
        size = self.options["img_size"]
        size = (size, size) if isinstance(size, int) else tuple(size)
        return self.tensor("input", (self.batch, 3, *size))

    def tensor(self, key: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor that belongs to a text, float64."""
        return torch.from_numpy(normal(self.salt + key, shape))

    def names(self, key: str) -> list[str]:
        """A list of names as Python strings."""
        return [str(name) for name in self.data[key]]

    def check_forward(self, logits: torch.Tensor, maps: list[torch.Tensor], tolerance: float) -> None:
        """Logits and the maps of every stage, relative to the largest entry."""
        assert relative(logits, torch.from_numpy(self.data["logits"])) < tolerance
        for i, feature in enumerate(maps):
            assert list(feature.shape) == self.data[f"feat{i}_shape"].tolist()
            picked = feature.reshape(-1)[torch.from_numpy(self.data[f"feat{i}_index"])]
            assert relative(picked, torch.from_numpy(self.data[f"feat{i}_value"])) < tolerance
            mean_std = torch.stack([feature.double().mean(), feature.double().std()])
            expected = torch.from_numpy(self.data[f"feat{i}_mean_std"])
            assert torch.allclose(mean_std, expected, rtol=0, atol=1e-5 * float(feature.abs().max()))

    def check_gradients(self, model: FocalTransformer, tolerance: float, floor: float = 1e-3) -> None:
        """Norm of every gradient, and its product with a known direction.

        Some gradients are zero but for rounding (a constant added to all scores), or a small sum of large
        numbers: hence the floor, of norms relative to the median one.
        """
        gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
        assert sorted(gradients) == sorted(self.names("grad_names")), "a parameter without a gradient"
        floor *= float(np.median(self.data["grad_norm"]))
        rows = zip(self.names("grad_names"), self.data["grad_norm"], self.data["grad_dot"], strict=True)
        for name, norm, dot in rows:
            gradient, bound = gradients[name], tolerance * max(norm, floor)
            assert abs(gradient.norm().item() - norm) < bound, name
            assert abs((gradient * self.tensor("dot." + name, tuple(gradient.shape))).sum() - dot) < bound, (
                name
            )


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest entry of `b`."""
    return float((a.detach().double() - b.double()).abs().max() / b.abs().max())
