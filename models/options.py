"""The model's options: what contradicts what, and what follows from them for one stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .key_selection import NearestKeys, RingPooledKeys
from .layers import POOLS
from .ops import BACKEND_CHOICES

KINDS = ("focal", "focalv2")
POOL_CHOICES = ("none", *POOLS)
EXPAND_LAYERS: dict[str, Callable[[int], bool]] = {
    "all": lambda block: True,
    "even": lambda block: block % 2 == 1,
    "odd": lambda block: block % 2 == 0,
}
"""Which blocks keep their ring; the names say, as in the original, which ones lose it."""

CHOICES = {
    "kind": KINDS,
    "focal_pool": POOL_CHOICES,
    "expand_layer": tuple(EXPAND_LAYERS),
    "attention_backend": BACKEND_CHOICES,
}
PER_STAGE = ("num_heads", "focal_levels", "focal_windows", "expand_sizes")


@dataclass(frozen=True)
class StageOptions:
    """Options of one stage, resolved: no lists per stage, no names to look up."""

    kind: str
    dim: int
    num_heads: int
    map_size: tuple[int, int]
    window_size: int
    shift_size: int
    expand_size: int
    expand_layer: str
    focal_window: int
    focal_topk: int
    pool: str
    pooled_levels: int
    mlp_ratio: float
    qkv_bias: bool
    qk_scale: float | None
    layerscale_value: float | None
    attention_backend: str

    @classmethod
    def of_stage(cls, options: Mapping[str, Any], stage: int, map_size: tuple[int, int]) -> StageOptions:
        """Resolve the constructor's options for one stage whose map at `img_size` is `map_size`.

        A stage no larger than a window is one window, without ring or shift.
        """
        single = min(map_size) <= options["window_size"]
        pools = options["focal_pool"] != "none" and stage in options["focal_stages"]
        levels = options["focal_levels"][stage]
        return cls(
            kind=options["kind"],
            dim=options["embed_dim"] * 2**stage,
            num_heads=options["num_heads"][stage],
            map_size=map_size,
            window_size=min(map_size) if single else options["window_size"],
            shift_size=options["window_size"] // 2 if options["use_shift"] and not single else 0,
            expand_size=0 if single or levels == 0 else options["expand_sizes"][stage],
            expand_layer=options["expand_layer"],
            focal_window=options["focal_windows"][stage],
            focal_topk=options["focal_topk"],
            pool=options["focal_pool"] if pools else "none",
            pooled_levels=max(levels - 1, 0) if pools else 0,
            mlp_ratio=options["mlp_ratio"],
            qkv_bias=options["qkv_bias"],
            qk_scale=_number_or_none(options["qk_scale"]),
            layerscale_value=options["layerscale_value"] if options["use_layerscale"] else None,
            attention_backend=options["attention_backend"],
        )

    def shift(self, block: int) -> int:
        """How far block number `block` rolls its map."""
        return self.shift_size if block % 2 == 1 else 0

    def selection(self, block: int) -> RingPooledKeys | NearestKeys:
        """The keys that block number `block` selects."""
        if self.kind == "focalv2":
            return NearestKeys(self.window_size, self.focal_topk, self.pooled_levels, self.map_size)
        expand = self.expand_size if EXPAND_LAYERS[self.expand_layer](block) else 0
        return RingPooledKeys(
            self.window_size, expand, self.focal_window, self.pooled_levels, self.shift(block)
        )


def _number_or_none(value: float | None) -> float | None:
    """The config's False (no scale given) is None here."""
    return None if value is None or value is False else float(value)


def smallest_side(options: Mapping[str, Any]) -> int:
    """Pixels that an image needs on a side for the last stage to have a token; never fewer than 32."""
    return max(32, options["patch_size"] * 2 ** (len(options["depths"]) - 1))


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options that contradict each other.

    Raises:
        ValueError: every problem, one a line, with what was expected and what came.
    """
    problems = [
        f"{key} must be one of {', '.join(names)}, got {options[key]!r}"
        for key, names in CHOICES.items()
        if options[key] not in names
    ]
    stages = len(options["depths"])
    for key in PER_STAGE:
        if len(options[key]) != stages:
            problems.append(
                f"{key} must have one entry for each of the {stages} depths, got {list(options[key])}"
            )
    problems += _number_problems(options)
    if not problems:
        problems = [problem for stage in range(stages) for problem in _stage_problems(options, stage)]
    if problems:
        raise ValueError("the model's options do not fit together:\n  " + "\n  ".join(problems))


def _number_problems(options: Mapping[str, Any]) -> list[str]:
    """What is wrong with values that stand alone."""
    problems = []
    size, least = options["img_size"], smallest_side(options)
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or min(sides) < least:
        problems.append(f"img_size must be a side or two sides of at least {least} pixels, got {size}")
    for key in ("patch_size", "in_chans", "embed_dim", "window_size", "focal_topk"):
        if options[key] < 1:
            problems.append(f"{key} must be at least 1, got {options[key]}")
    if options["num_classes"] < 0:
        problems.append(f"num_classes must be 0 (no head) or more, got {options['num_classes']}")
    if options["mlp_ratio"] <= 0:
        problems.append(f"mlp_ratio must be positive, got {options['mlp_ratio']}")
    for key in ("drop_rate", "drop_path_rate"):
        if not 0 <= options[key] < 1:
            problems.append(f"{key} must lie in [0, 1), got {options[key]}")
    if len(options["depths"]) < 1 or min(options["depths"]) < 1:
        problems.append(
            f"depths must name at least one stage of at least one block, got {list(options['depths'])}"
        )
    if options["use_conv_embed"] and options["patch_size"] != 4:
        problems.append(
            f"use_conv_embed has patches of stride 4: patch_size must be 4, got {options['patch_size']}"
        )
    unknown = [stage for stage in options["focal_stages"] if not 0 <= stage < len(options["depths"])]
    if unknown and len(options["depths"]) >= 4:
        problems.append(f"focal_stages names stages that do not exist: {unknown}")
    return problems


def _stage_problems(options: Mapping[str, Any], stage: int) -> list[str]:
    """What is wrong in one stage."""
    problems = []
    dim, heads = options["embed_dim"] * 2**stage, options["num_heads"][stage]
    window, levels = options["window_size"], options["focal_levels"][stage]
    pools = options["focal_pool"] != "none" and stage in options["focal_stages"]
    if heads < 1 or dim % heads:
        problems.append(f"stage {stage}: num_heads must divide the {dim} channels, got {heads}")
    if options["kind"] == "focalv2":
        if levels not in (1, 2):
            problems.append(f"stage {stage}: Focal-fast has focal_levels 1 or 2, got {levels}")
        if levels == 2 and not pools:
            problems.append(
                f"stage {stage}: focal_levels 2 of Focal-fast needs a pool: set focal_pool or list the stage"
            )
    elif levels not in (0, 1, 2, 3):
        problems.append(f"stage {stage}: focal_levels must be 0 to 3, got {levels}")
    if options["kind"] == "focal" and not 0 <= options["expand_sizes"][stage] <= window:
        got = options["expand_sizes"][stage]
        problems.append(
            f"stage {stage}: expand_sizes must lie between 0 and the window size {window}, got {got}"
        )
    if pools and levels > 1 and options["kind"] == "focal" and options["focal_windows"][stage] % 2 == 0:
        problems.append(f"stage {stage}: focal_windows must be odd, got {options['focal_windows'][stage]}")
    if pools and levels > 1 and window < 2 ** (levels - 2):
        problems.append(
            f"stage {stage}: a window of {window} cannot be divided into {2 ** (levels - 2)} cells a side"
        )
    return problems
