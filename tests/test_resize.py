"""Checkpoints of one window, ring, pooled region or input size that initialise models of another."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from golden_files import SMALL as SMALL_FILES
from golden_files import Golden
from small_models import image
from timm.layers import to_2tuple
from torch import Tensor

from models import FocalTransformer, load_checkpoint
from models.focal_transformer import grid, ring_offsets
from models.resize import resize_state

VARIANTS = {
    "focal": {"kind": "focal"},
    "focal_conv": {"kind": "focal", "use_conv_embed": True},
    "fast": {"kind": "focalv2", "use_conv_embed": True},
}
"""The released families; sizes of one family differ in channels and depths only."""
SETTINGS = {
    "window 12": {"window_size": 12, "expand_sizes": [5] * 4, "img_size": 384},
    "window 4": {"window_size": 4, "expand_sizes": [2] * 4},
    "windows 15 13 9 7": {"focal_windows": [15, 13, 9, 7]},
    "input 384": {"img_size": 384},
    "input 320 x 192": {"img_size": [320, 192]},
}
PREFIX = "layers.1.blocks.0.attn."
OWN, RING = f"{PREFIX}relative_position_bias_table", f"{PREFIX}relative_position_bias_table_to_neighbors"
POOLED, CELL = f"{PREFIX}relative_position_bias_table_to_windows.0", "layers.1.blocks.0.pool_layers.0.weight"
LAST_RING = "layers.3.blocks.0.attn.relative_position_bias_table_to_neighbors"


build = partial(small_models.build, img_size=224)


def saved(model: FocalTransformer, folder: Path, **changes: Tensor) -> Path:
    torch.save({"model": model.state_dict() | changes}, folder / "given.pth")
    return folder / "given.pth"


def resized(value: Tensor, shape: tuple[int, ...], name: str, map_size: Any = None) -> Tensor:
    """One parameter, of the shape that a model wants."""
    given = {name: value}
    resize_state(given, {name: torch.empty(shape)}, map_size)
    return given[name]


# --- Whole checkpoints --------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", SMALL_FILES, ids=lambda file: file.stem)
def test_nothing_changes_where_the_setting_is_the_same(file: Path, tmp_path: Path) -> None:
    """Every option, with the original's own choice of nearest keys."""
    golden = Golden(file)
    model = golden.build()
    fresh = FocalTransformer(kind=golden.kind, **golden.options).double()
    report = load_checkpoint(fresh, saved(model, tmp_path), resize=True)
    assert (report.resized, report.continued, report.dropped, report.kept) == ([], [], [], [])
    given = model.state_dict()
    assert all(torch.equal(value, given[name]) for name, value in fresh.state_dict().items())


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_of_another_setting(variant: str, setting: str, tmp_path: Path, caplog: Any) -> None:
    """Only on request; what does not depend on the setting is loaded as it is, the rest reported."""
    options = VARIANTS[variant]
    given = build(1, **options)
    path = saved(given, tmp_path)
    model = build(2, **options, **SETTINGS[setting])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shapes, wanted = ({k: v.shape for k, v in state.items()} for state in (given.state_dict(), before))
    unlike = [key for key in shapes | wanted if shapes.get(key) != wanted.get(key)]
    if any("topk" not in name for name in unlike):
        with pytest.raises(ValueError, match=r"\(resize\) fits other windows, another input size"):
            load_checkpoint(model, path)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    else:  # nearest keys are chosen anew in any case
        assert load_checkpoint(model, path).kept == unlike
    with caplog.at_level(logging.INFO):
        report = load_checkpoint(model, path, resize=True)
    told = [*report.resized, *report.continued, *report.dropped, *report.kept]
    assert len({*told}) == len(told) and {*unlike} <= {*told}
    assert all(name in caplog.text for name in told[:1])
    loaded, state = model.state_dict(), given.state_dict()
    for name, value in loaded.items():
        if name not in told:
            assert torch.equal(value, state[name]), name
        else:  # nothing is left as it was made, but for nearest keys
            assert "topk" in name or not torch.equal(value, before[name]), name
    with torch.no_grad():
        assert model(image(*to_2tuple(SETTINGS[setting].get("img_size", 224)))).isfinite().all()


def test_position_embedding_as_the_model_resizes_it(tmp_path: Path) -> None:
    """A model built for 384 pixels answers as one built for 224 does at 384, but for its last stage."""
    given = build(1, ape=True)
    larger = build(2, ape=True, img_size=384)
    report = load_checkpoint(larger, saved(given, tmp_path), resize=True)
    assert report.resized == ["absolute_pos_embed"] and report.continued == [LAST_RING]
    with torch.no_grad():
        got = larger.forward_intermediates(image(384, 384), [0, 1, 2], intermediates_only=True)
        expected = given.forward_intermediates(image(384, 384), [0, 1, 2], intermediates_only=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_maps_that_are_not_square() -> None:
    """As long to each other as the model's are, or else square."""
    ramp = torch.arange(8.0)[:, None].expand(8, 4).reshape(1, 32, 1)
    tall = resized(ramp, (1, 16 * 8, 1), "absolute_pos_embed", (16, 8)).view(16, 8)
    torch.testing.assert_close(tall[3:-3, 0], torch.arange(3.0, 13) / 2 - 0.25)
    torch.testing.assert_close(tall, tall[:, :1].expand(16, 8))
    square = resized(torch.ones(1, 49, 1), (1, 16 * 8, 1), "absolute_pos_embed", (16, 8))
    torch.testing.assert_close(square, torch.ones(1, 128, 1))


# --- Rings come and go --------------------------------------------------------------------------------------


def test_a_stage_that_was_a_single_window_gets_a_ring(tmp_path: Path) -> None:
    """Its bias goes on from that of the own window: the same at the same offset, the border's beyond."""
    given, larger = build(1), build(2, img_size=384)
    report = load_checkpoint(larger, saved(given, tmp_path), resize=True)
    assert (report.resized, report.continued, report.dropped) == ([], [LAST_RING], [])
    own = given.state_dict()[f"{LAST_RING.removesuffix('_to_neighbors')}"].view(13, 13, -1)
    ring = larger.state_dict()[LAST_RING][0]
    offset = torch.from_numpy(grid(7, 7)[:, None] - ring_offsets(7, 3)[None]).clamp(-6, 6) + 6
    assert torch.equal(ring, own[offset[..., 0], offset[..., 1]].permute(2, 0, 1))


def test_a_ring_that_the_model_lacks_is_dropped(tmp_path: Path) -> None:
    larger, smaller = build(1, img_size=384), build(2)
    with pytest.raises(ValueError, match=r"(?s)does not fit the model.*1 unexpected: layers.3.*neighbors"):
        load_checkpoint(smaller, saved(larger, tmp_path))
    report = load_checkpoint(smaller, saved(larger, tmp_path), resize=True)
    assert (report.resized, report.continued, report.dropped) == ([], [], [LAST_RING])


# --- Numbers ------------------------------------------------------------------------------------------------


def plane(place: Tensor) -> Tensor:
    """A linear function of positions [..., 2], other in rows than in columns."""
    return place[..., 0] * 2 - place[..., 1] + 1


def square(side: int, scale: float) -> Tensor:
    """The plane around its centre, [side, side], in units of `scale` cells."""
    place = torch.from_numpy(grid(side, side)) - (side - 1) / 2
    return plane(place.float() * scale).view(side, side)


@pytest.mark.parametrize(("old", "new"), [(7, 12), (7, 8), (4, 14)])
def test_linear_tables_stay_linear(old: int, new: int) -> None:
    """In the interior, for own windows and pooled levels: offsets stretch with the table."""
    sides, inner = (2 * old - 1, 2 * new - 1), slice(new, new - 1 + new // 2)
    table, wanted = (square(side, sides[0] / side) for side in sides)
    got = resized(table.reshape(-1, 1), (sides[1] ** 2, 1), OWN).view(sides[1], sides[1])
    torch.testing.assert_close(got[inner, inner], wanted[inner, inner], rtol=1e-4, atol=1e-4)
    pooled = resized(table.reshape(1, -1), (1, sides[1] ** 2), POOLED)
    torch.testing.assert_close(pooled, got.reshape(1, -1))


@pytest.mark.parametrize(("old", "new"), [((7, 3), (12, 5)), ((7, 3), (7, 2)), ((4, 1), (8, 8))])
def test_linear_rings_stay_linear(old: tuple[int, int], new: tuple[int, int]) -> None:
    """Entries of a ring are read at their offset, wherever it is near enough for the border not to matter."""
    scale = (2 * sum(old) - 1) / (2 * sum(new) - 1)

    def offsets(sides: tuple[int, int]) -> Tensor:
        return torch.from_numpy(grid(sides[0], sides[0])[:, None] - ring_offsets(*sides)[None]).float()

    table, wanted = plane(offsets(old)), plane(offsets(new) * scale)
    got = resized(table[None, None], (1, 1, *wanted.shape), RING)[0, 0]
    inner = offsets(new).abs().amax(dim=-1) * scale < sum(old) - 3
    assert inner.any()
    error = 1e-4 if scale < 1 else 0.05  # shrinking averages, over a grid that does not quite fit
    torch.testing.assert_close(got[inner], wanted[inner], rtol=0, atol=error)


@pytest.mark.parametrize(("old", "new"), [((1, 49), (1, 144)), ((6, 1, 7, 7), (6, 1, 4, 4))])
def test_pooling_keeps_the_sum_of_its_weights(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    """An even map is pooled to what it was."""
    weight = torch.full(old, 0.1)
    got = resized(weight, new, CELL)
    torch.testing.assert_close(got.flatten(1).sum(dim=1), weight.flatten(1).sum(dim=1))
    assert (got - got.flatten()[0]).abs().max() < 1e-6


def test_half_precision_is_resized_in_full() -> None:
    table = torch.randn(169, 2)
    exact = resized(table, (529, 2), OWN)
    assert resized(table.half(), (529, 2), OWN).dtype == torch.float32
    torch.testing.assert_close(resized(table.half(), (529, 2), OWN), exact, rtol=0, atol=3e-3)


# --- Focal-fast's choices -----------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"img_size": 208}, "half", "damaged"], ids=str)
def test_choices_that_are_not_the_nearest_are_made_anew(change: Any, tmp_path: Path) -> None:
    """208 pixels have as many windows as 224: the numbers of the file's tokens mean others."""
    options = VARIANTS["fast"]
    given, model = build(1, **options | (change if isinstance(change, dict) else {})), build(2, **options)
    own = {name: value.clone() for name, value in model.named_buffers()}
    state = given.half().state_dict() if change == "half" else given.state_dict()
    if not isinstance(change, dict):
        convert = torch.Tensor.half if change == "half" else (lambda keys: keys + 10**6)
        state |= {name: convert(keys) for name, keys in given.named_buffers()}
    torch.save(state, tmp_path / "given.pth")
    report = load_checkpoint(model, tmp_path / "given.pth")
    assert "layers.0.blocks.0.attn.topk_cloest_indice_0" in report.kept
    model.load_state_dict(state)
    assert all(torch.equal(value, own[name]) for name, value in model.named_buffers())


# --- Refused ------------------------------------------------------------------------------------------------


NORM = "layers.1.blocks.0.norm1.weight"
REFUSED = {  # other options of the model, other entries of the file, what is said
    "other heads": ({}, {OWN: torch.zeros(169, 5)}, f"another shape: {OWN}"),
    "no square": ({}, {OWN: torch.zeros(170, 2)}, f"another shape: {OWN}"),
    "empty": ({}, {OWN: torch.zeros(0, 2)}, f"another shape: {OWN}"),
    "whole numbers": ({}, {OWN: torch.zeros(121, 2, dtype=torch.long)}, f"another shape: {OWN}"),
    "nan": ({}, {OWN: torch.full((121, 2), float("nan"))}, f"nan or inf: {OWN}"),
    "ring of no window": ({}, {RING: torch.zeros(1, 2, 50, 132)}, f"another shape: {RING}"),
    "ring of no expand size": ({}, {RING: torch.zeros(1, 2, 36, 131)}, f"another shape: {RING}"),
    "pooled, no square": ({}, {POOLED: torch.zeros(2, 122)}, f"another shape: {POOLED}"),
    "pool of another kind": ({}, {CELL: torch.zeros(16, 1, 7, 7)}, f"another shape: {CELL}"),
    "channels": ({}, {NORM: torch.zeros(4)}, f"another shape: {NORM}"),
    "another model: levels": ({"focal_levels": [3, 3, 3, 3]}, {}, "Use an undamaged copy.*missing: layers"),
    "another model: width": ({"embed_dim": 16}, {}, "Use an undamaged copy.*another shape"),
    "another model: blocks": (
        {"depths": [1] * 4},
        {},
        "Use an undamaged copy.*unexpected: layers.0.blocks.1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_resized_is_refused(case: str, tmp_path: Path) -> None:
    """With the error of a load that does not resize; nothing is loaded."""
    options, changes, reason = REFUSED[case]
    model = build(2, **options)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"(?s)given.pth does not fit.*{reason}"):
        load_checkpoint(model, saved(build(1), tmp_path, **changes), resize=True)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
