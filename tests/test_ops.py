"""Attention operators against the definition, and which keys a window sees."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from attention_definition import Problem, defined_attention, request
from torch import Tensor

from models.focal_transformer import (
    BACKENDS,
    AttentionIndex,
    choose_backend,
    focal_fast_keys,
    focal_keys,
    make_index,
    nearest_cells,
    padded_size,
)
from models.ops import cpu

META = torch.device("meta")
MAPS = [(7, 7), (14, 14), (15, 9), (28, 21), (3, 30)]
RINGS = [(3, 3, 1, 0), (0, 5, 2, 0), (2, 1, 0, 0), (4, 3, 1, 3), (7, 7, 1, 0), (1, 3, 1, 0)]


def ring(size: tuple[int, int], numbers: tuple[int, ...]) -> AttentionIndex:
    """Keys of windows of 7; numbers: expand size, region, pooled levels, shift."""
    return make_index(focal_keys, (*padded_size(*size, 7), 7, *numbers), request("cpu"))


def nearest(size: tuple[int, int], topk: int, levels: int) -> AttentionIndex:
    return make_index(focal_fast_keys, (*size, 7, topk, levels, None), request("cpu"))


def agree(index: AttentionIndex, images: int = 2) -> None:
    problem = Problem(index, 8, torch.float64, batch=images)
    expected = problem.run(defined_attention)
    for name in ("plain", "cpu"):
        found = problem.run(BACKENDS[name].attend)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: name + m)


def prepared(index: AttentionIndex, bias: Tensor) -> Tensor:
    """The bias as the CPU's operator gets it."""
    found = []

    def keep(qkv: Tensor, bias: Tensor, *_: Any) -> Tensor:
        found.append(bias)
        return qkv

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "attention", keep)
        cpu.attend(torch.empty(0, dtype=bias.dtype), index, bias.detach(), 1.0)
    return found[0].contiguous()


# --- The same numbers as the definition ---------------------------------------------------------------------


@pytest.mark.parametrize("numbers", RINGS, ids=str)
@pytest.mark.parametrize("size", MAPS, ids=str)
def test_ring_and_pooled_keys(size, numbers) -> None:
    index = ring(size, numbers)
    agree(index)


@pytest.mark.parametrize(("topk", "levels"), [(40, 1), (128, 1), (1000, 0)])
@pytest.mark.parametrize("size", MAPS, ids=str)
def test_nearest_keys(size, topk, levels) -> None:
    index = nearest(size, topk, levels)
    assert index.visible is None
    agree(index)


@pytest.mark.parametrize("at_once", [1, 7, 24])
def test_pieces_change_nothing(at_once, monkeypatch) -> None:
    """Windows are worked on a few at a time on the CPU: one by one, with a rest, and all of an image."""
    monkeypatch.setattr(cpu, "_at_once", lambda _: at_once)
    index = ring((28, 21), (3, 3, 1, 0))
    assert len(index.keys) * 2 == 24
    agree(index, images=3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", [14, 28])
def test_half_precision_is_no_worse_than_the_definition(dtype, side) -> None:
    problem = Problem(ring((side, side), (3, 5, 1, 0)), 8, dtype, batch=2)
    for name in ("plain", "cpu"):
        problem.check_as_exact(BACKENDS[name].attend)


@pytest.mark.parametrize("side", [14, 28])
def test_strides_of_inputs_do_not_matter(side) -> None:
    index, found = ring((side, side), (3, 5, 1, 0)), []
    qkv, bias = Problem(index, 16, torch.float64, batch=2).inputs(torch.float64)
    slopes = torch.randn(2, side**2, 32, dtype=torch.float64)[..., ::2]
    for attend in (defined_attention, cpu.attend):
        out = attend(qkv[..., ::2], index, bias.mT.contiguous().mT, 0.4)
        found.append(torch.autograd.grad(out, (qkv, bias), slopes))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("compiled", [False, True])
def test_training_keeps_no_gathered_keys(compiled) -> None:
    """What is saved for the backward pass is qkv, the bias of every window, and little more."""
    index = ring((28, 28), (3, 7, 1, 0))
    qkv, bias = Problem(index, 8, torch.float32, batch=8).inputs(torch.float32)
    saved = {}

    def keep(x: Tensor) -> Tensor:
        if x.is_floating_point():
            saved[id(x.untyped_storage())] = x.untyped_storage().nbytes()
        return x

    def attend(qkv: Tensor, bias: Tensor) -> Tensor:
        return cpu.attend(qkv, index, bias, 0.4)

    if compiled:
        torch.compiler.reset()
        attend = torch.compile(attend, backend="aot_eager_decomp_partition", fullgraph=True, dynamic=False)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = attend(qkv, bias)
    assert out.requires_grad
    gathered = 8 * 2 * 16 * 2 * 218 * 8 * 4  # bytes of 8 images' keys and values, 2 heads, 16 windows
    needed = sum(x.untyped_storage().nbytes() for x in (qkv, prepared(index, bias)))
    assert needed <= sum(saved.values()) <= needed + 4 * bias.untyped_storage().nbytes() < needed + gathered


# --- Which keys a window sees -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(14, 21), (28, 14)], ids=str)
def test_rolled_windows_see_what_was_near_before_the_roll(size) -> None:
    """On maps that are not square; test_golden.py compares the rest of the geometry with the original."""
    index, places = ring(size, (3, 3, 1, 3)), 7 * 7
    own = index.keys[:, :places]
    before = torch.stack([(own // size[1] + 3) % size[0], (own % size[1] + 3) % size[1]], dim=-1)
    apart = (before[:, :, None] - before[:, None]).abs().amax(dim=-1)  # [P, Q, Q]
    assert torch.equal(index.visible[:, :, :places], apart < 7)


@pytest.mark.parametrize("size", [(1, 1), (7, 7), (5, 40), (30, 3), (20, 31)], ids=str)
def test_nearest_cells_against_a_full_sort(size) -> None:
    """Around the windows' centres, and around places outside the map."""
    centres = tuple(np.arange(-(-side // 7)) * 7 + 3 for side in size)
    outside = np.array([-40, -1, 2, 90, size[0]]), np.array([size[1] - 1, -2, 200])
    cells = np.array([*itertools.product(*map(range, size))])
    for rows, columns in (centres, outside):
        crossings = np.array([*itertools.product(rows, columns)])
        distance = ((crossings[:, None] - cells[None]) ** 2).sum(-1)
        expected = np.argsort(distance, axis=1, kind="stable")
        for count in {min(count, len(cells)) for count in (1, 5, 40, 128)}:
            assert np.array_equal(nearest_cells(rows, columns, *size, count), expected[:, :count])


@pytest.mark.parametrize("size", [(8, 8), (15, 9), (1, 1), (3, 30)], ids=str)
def test_focal_fast_never_sees_padding(size) -> None:
    index, fine = nearest(size, 128, 1), min(128, size[0] * size[1])
    rows, columns = index.keys[:, :fine] // index.width, index.keys[:, :fine] % index.width
    assert (rows < size[0]).all() and (columns < size[1]).all()
    coarse = index.keys[:, fine:] - index.height * index.width
    assert coarse.shape[1] == min(128, len(index.keys))
    assert (coarse >= 0).all() and (coarse < len(index.keys)).all()


# --- Keys that stand twice ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "visible", "merged"),
    [
        ([[5, 5, 5, 2]], None, 3),
        ([[1, 3, 1, 2], [4, 3, 4, 0]], None, 3),
        ([[1, 1, 2], [1, 3, 2]], None, 3),
        ([[1, 2, 3], [1, 2, 3]], None, 3),
        ([[4, 4, 4, 2, 2, 3]], [True, False, False, True, True, True], 5),
    ],
    ids=str,
)
def test_which_keys_are_merged(keys, visible, merged) -> None:
    """Two of the same token, if their columns are alike in every window and always visible."""
    seen = None if visible is None else torch.tensor(visible).view(1, 1, -1)
    index = AttentionIndex(1, len(keys), 1, 6, torch.tensor(keys), seen, ())
    index = choose_backend(index, request("cpu"))
    assert index.tables.merged.keys.shape[1] == merged
    agree(index)


# --- Who runs which operator --------------------------------------------------------------------------------


def test_the_choice_of_an_operator() -> None:
    index = ring((7, 7), (0, 1, 0, 0))

    def choose(*wanted: Any, **more: Any) -> tuple[str, str]:
        chosen = choose_backend(index, request(*wanted, **more))
        return chosen.backend, chosen.fallback_reason

    assert choose("plain") == ("plain", "")
    assert choose("cpu") == choose("auto", torch.bfloat16) == ("cpu", "")
    assert choose("auto", torch.int8)[0] == choose("auto", device=META)[0] == "plain"
    why = choose("auto", device=META)[1]
    assert "cpu: needs tensors on the CPU, got meta" in why and "triton: needs a CUDA device, got meta" in why
    with pytest.raises(ValueError, match="attention_backend cpu: .*, got meta; use auto, or one of plain"):
        choose("cpu", device=META)
    with pytest.raises(ValueError, match="must be one of auto, plain, triton, cpu, got 'flash'"):
        choose("flash")


def test_operators_are_registered_as_pytorch_wants_it() -> None:
    """Schema, fake tensors, autograd and compilation; outputs are contiguous, however inputs lie."""
    index = ring((14, 14), (3, 5, 1, 0))
    qkv, bias = Problem(index, 8, torch.bfloat16, batch=2).inputs(torch.bfloat16)
    bias = prepared(index, bias)
    made = index.tables
    rest = (made.mask, made.keys, made.rows, 14, 14, 7, 0.4)
    torch.library.opcheck(cpu.attention, (qkv, bias.requires_grad_(), *rest))
    read, _, *others = made.rows
    rest = (made.mask, made.keys, read, *others, 0.4)
    slopes = torch.randn(2, 196, 16, dtype=torch.bfloat16)
    for turned in (bias, bias.mT.contiguous().mT):
        torch.library.opcheck(cpu.attention_backward, (slopes, qkv.detach(), turned.detach(), *rest))
