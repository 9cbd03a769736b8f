"""The attention operator alone: tables against brute force, backends against each other."""

import itertools

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

from models.geometry import fill_up, grid, nearest_cells
from models.key_selection import KEYS_MULTIPLE, NearestKeys, RingPooledKeys, _nearest_keys, _ring_pooled_keys
from models.ops import PORTABLE_BACKENDS, cpu_kernel, focal_attention, resolve_backend, sdpa

CPU = torch.device("cpu")
MAPS = [(7, 7), (14, 14), (15, 9), (28, 21), (3, 30)]


def random_problem(table, tokens: int, dtype: torch.dtype, per_window: bool, heads: int = 2, dim: int = 8):
    """Queries, keys and values, and a bias."""
    generator = torch.Generator().manual_seed(0)
    qkv = (
        torch.randn(2, tokens, 3, heads, dim, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
    )
    windows, keys = table.index.shape
    queries = table.window**2
    shape = (heads, windows if per_window else 1, queries, keys)
    bias = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return qkv, bias


def run(table, qkv, bias, backend: str):
    out = focal_attention(qkv, table, bias, 0.4, backend)
    return [out, *torch.autograd.grad(out.square().sum(), (qkv, bias))]


def tokens_of(table, pooled: int) -> int:
    windows = table.index.shape[0]
    return table.height * table.width + sum(windows * 4**level for level in range(pooled))


@pytest.mark.parametrize("size", MAPS, ids=str)
@pytest.mark.parametrize(
    ("expand", "focal_window", "pooled", "shift"),
    [(3, 3, 1, 0), (0, 5, 2, 0), (2, 1, 0, 0), (4, 3, 1, 3), (7, 7, 1, 0), (1, 3, 1, 0)],
)
def test_backends_agree_on_ring_and_pooled_keys(size, expand, focal_window, pooled, shift) -> None:
    table = _ring_pooled_keys(RingPooledKeys(7, expand, focal_window, pooled, shift), *size, CPU).table
    problem = random_problem(table, tokens_of(table, pooled), torch.float64, per_window=False)
    expected = run(table, *problem, "reference")
    for backend in PORTABLE_BACKENDS:
        torch.testing.assert_close(run(table, *problem, backend), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("at_once", [1, 7, 24])
def test_pieces_change_nothing(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows are worked on a few at a time on the CPU: one by one, with a rest, and all of an image."""
    monkeypatch.setattr(cpu_kernel, "_at_once", lambda _: at_once)
    table = _ring_pooled_keys(RingPooledKeys(7, 3, 3, 1, 0), 28, 21, CPU).table
    assert table.dense is None
    qkv, bias = random_problem(table, tokens_of(table, 1), torch.float64, per_window=False)
    qkv = torch.cat([qkv, qkv.flip(0), 2 * qkv[:1]]).detach().requires_grad_()  # 5 images
    expected = run(table, qkv, bias, "reference")
    torch.testing.assert_close(run(table, qkv, bias, "sdpa"), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("threads", [1, 2, 6])
@pytest.mark.parametrize("matrices", [1, 12, 96, 191, 192])
@pytest.mark.parametrize("scores", [49, 49 * 224, 2**20])
def test_pieces_suit_threads(
    threads: int, matrices: int, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same number of matrices for each thread, near the number of scores that is wanted."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    threads = max(2, threads)
    wanted = threads * cpu_kernel.SCORES_AT_ONCE
    step = cpu_kernel._at_once(torch.empty(matrices, scores, 1, device="meta"))
    assert 1 <= step <= matrices
    assert step % threads == 0 or step < threads or step == matrices
    assert step * scores <= 1.5 * wanted + (threads if step > threads else 1) * scores
    assert step == matrices or step * scores >= 0.6 * wanted


@pytest.mark.parametrize("size", MAPS, ids=str)
@pytest.mark.parametrize(("topk", "pooled"), [(40, 1), (128, 1), (1000, 0)])
def test_backends_agree_on_nearest_keys(size, topk, pooled) -> None:
    table = _nearest_keys(NearestKeys(7, topk, pooled, (14, 14)), *size, CPU).table
    problem = random_problem(table, tokens_of(table, pooled), torch.float64, per_window=True)
    expected = run(table, *problem, "reference")
    for backend in PORTABLE_BACKENDS:
        torch.testing.assert_close(run(table, *problem, backend), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", [14, 28])
def test_half_precision_is_no_worse_than_the_reference(dtype, side: int) -> None:
    table = _ring_pooled_keys(RingPooledKeys(7, 3, 5, 1), side, side, CPU).table
    assert (table.dense is not None) == (side == 14)
    qkv, bias = random_problem(table, tokens_of(table, 1), torch.float64, per_window=False)
    exact = run(table, qkv, bias, "reference")
    rough = [x.detach().to(dtype).requires_grad_() for x in (qkv, bias)]
    errors = {
        name: [
            float((a - b).detach().abs().max() / b.detach().abs().max())
            for a, b in zip(run(table, *rough, name), exact, strict=True)
        ]
        for name in PORTABLE_BACKENDS
    }
    for name, found in errors.items():
        assert all(mine <= 2 * its + 1e-3 for mine, its in zip(found, errors["reference"], strict=True)), (
            name,
            errors,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", [14, 28])
def test_the_operator_is_registered_as_pytorch_wants_it(side: int, dtype: torch.dtype) -> None:
    """Schema, fake tensors, autograd and compilation, in the dense form and with gathered keys."""
    table = _ring_pooled_keys(RingPooledKeys(7, 3, 5, 1), side, side, CPU).table
    qkv, bias = random_problem(table, tokens_of(table, 1), dtype, per_window=False)
    prepared = PORTABLE_BACKENDS["sdpa"].prepare_bias(bias, table, dtype).detach().requires_grad_()
    index = None if table.dense is not None else table.gathered_index
    rest = (prepared, index, table.readers, table.first_reader, side, side, 7, 0.4)
    torch.library.opcheck(cpu_kernel.attention, (qkv, *rest))
    slopes = torch.randn(2, side * side, 16).to(dtype)
    inputs = [x.detach() if isinstance(x, torch.Tensor) else x for x in (slopes, qkv, *rest)]
    torch.library.opcheck(cpu_kernel.attention_backward, inputs)
    inputs[2] = inputs[2].mT.contiguous().mT  # outputs are contiguous, however inputs lie
    torch.library.opcheck(cpu_kernel.attention_backward, inputs)


@pytest.mark.parametrize("side", [14, 28])
def test_no_images_and_transforms(side: int) -> None:
    """An empty batch has an empty result; `torch.func` differentiates what it is given."""
    table = _ring_pooled_keys(RingPooledKeys(7, 3, 5, 1), side, side, CPU).table
    qkv, bias = random_problem(table, tokens_of(table, 1), torch.float64, per_window=False)
    out, d_qkv, d_bias = run(table, qkv[:0], bias, "sdpa")
    assert out.shape == (0, side * side, 16) and d_qkv.shape == qkv[:0].shape and not d_bias.any()

    def loss(qkv: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return focal_attention(qkv, table, bias, 0.4, "sdpa").square().sum()

    transformed = torch.func.grad(loss, argnums=(0, 1))
    torch.compiler.reset()
    compiled = torch.compile(transformed, backend="aot_eager", fullgraph=True, dynamic=False)
    for function in (transformed, compiled):
        gradients = function(qkv.detach(), bias.detach())
        torch.testing.assert_close(list(gradients), run(table, qkv, bias, "sdpa")[1:])


@pytest.mark.parametrize("side", [14, 28])
@pytest.mark.parametrize("trains", [True, False])
def test_forward_mode_reaches_the_queries_keys_and_values(side: int, trains: bool) -> None:
    """A derivative along a direction is that of the reference, whether or not weights want gradients."""
    table = _ring_pooled_keys(RingPooledKeys(7, 3, 5, 1), side, side, CPU).table
    qkv, bias = random_problem(table, tokens_of(table, 1), torch.float64, per_window=False)
    direction = torch.randn_like(qkv)
    tangents = []
    for backend in ("sdpa", "reference"):
        with torch.set_grad_enabled(trains), forward_ad.dual_level():
            dual = forward_ad.make_dual(qkv.detach(), direction)
            out = focal_attention(dual, table, bias if trains else bias.detach(), 0.4, backend)
            tangents.append(forward_ad.unpack_dual(out).tangent)
    assert tangents[0] is not None
    torch.testing.assert_close(*tangents)


@pytest.mark.parametrize("side", [14, 28])
def test_training_after_inference_mode(side: int) -> None:
    """What is kept with a table serves both."""
    table = _ring_pooled_keys.__wrapped__(RingPooledKeys(7, 3, 5, 1), side, side, CPU).table
    problem = random_problem(table, tokens_of(table, 1), torch.float64, per_window=False)
    with torch.inference_mode():
        out = focal_attention(problem[0], table, problem[1], 0.4, "sdpa")
    torch.testing.assert_close(run(table, *problem, "sdpa"), run(table, *problem, "reference"))
    assert torch.equal(out, run(table, *problem, "sdpa")[0])


@pytest.mark.parametrize("side", [14, 28])
def test_graphs_have_the_operator_where_they_run_here(side: int) -> None:
    """Compiled they have it; made to run in another place they do without."""
    table = _ring_pooled_keys(RingPooledKeys(7, 3, 5, 1), side, side, CPU).table
    qkv, bias = random_problem(table, tokens_of(table, 1), torch.float32, per_window=False)
    graphs: list[torch.fx.GraphModule] = []

    class Layer(torch.nn.Module):
        def forward(self, qkv: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            return focal_attention(qkv, table, bias, 0.4, "sdpa")

    def collect(graph: torch.fx.GraphModule, example: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def has_operator(graph: torch.fx.GraphModule) -> bool:
        return any("cpu_attention" in str(node.target) for node in graph.graph.nodes)

    for trains in (True, False):
        torch.compiler.reset()
        with torch.set_grad_enabled(trains):
            torch.compile(Layer(), backend=collect, fullgraph=True)(qkv, bias)
        assert has_operator(graphs.pop()) == (trains or sdpa.TELLS_EXPORTS) and not graphs
    inputs = (qkv.detach(), bias.detach())
    expected = Layer()(*inputs)
    for strict in (True, False) if sdpa.TELLS_EXPORTS else (False,):
        exported = torch.export.export(Layer(), inputs, strict=strict)
        assert not has_operator(exported.graph_module)
        torch.testing.assert_close(exported.module()(*inputs), expected)
    traced = torch.jit.trace(Layer(), (qkv, bias), check_trace=False)
    assert "cpu_attention" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(qkv, bias), expected)


def test_row_numbers_are_kept_with_their_tables() -> None:
    """Made once for a table, and not those of another one."""
    first, second = (
        _ring_pooled_keys(RingPooledKeys(7, 3, focal_window, 1), 28, 28, CPU).table for focal_window in (3, 5)
    )
    rows = [cpu_kernel._rows(table.gathered_index, 28, 28, 7, 2, 5) for table in (first, second, first)]
    assert rows[0] is rows[2] and rows[0] is not rows[1]
    for table, made in zip((first, second), rows, strict=False):
        _, keys, _ = cpu_kernel._gathered_parts(made.read[0][:, None], 49, table.gathered_index.shape[1])
        assert torch.equal(keys[..., 0].long(), (table.gathered_index[:5] * 3 + 1) * 2)


def test_what_a_score_matrix_needs_lies_together() -> None:
    """Equal runs of rows, matrix by matrix, in every piece; gradients are arrays that products fill."""
    table = _ring_pooled_keys(RingPooledKeys(7, 3, 3, 1), 28, 28, CPU).table
    keys = table.gathered_index.shape[1]
    pieces = cpu_kernel._rows(table.gathered_index, 28, 28, 7, 2, 5).read
    assert [len(piece) // (49 + 2 * keys) for piece in pieces] == 6 * [5] + [2]  # 2 heads, 16 windows
    for number, piece in enumerate(pieces):
        matrices = piece.view(-1, 49 + 2 * keys)
        gathered = cpu_kernel._gathered_parts(piece[:, None], 49, keys)
        for matrix, parts in enumerate(zip(*gathered, strict=True)):
            assert torch.equal(torch.cat(parts)[:, 0], matrices[matrix])
            head, window = divmod(5 * number + matrix, 16)
            tokens = table.gathered_index[window]
            q, k, v = (part[:, 0].long() for part in parts)
            assert torch.equal(k, (tokens * 3 + 1) * 2 + head) and torch.equal(v, (tokens * 3 + 2) * 2 + head)
            first = window // 4 * 7 * 28 + window % 4 * 7
            assert q[0] == first * 3 * 2 + head and (q % 6 == head).all()
    for part in cpu_kernel._gradient_parts(torch.empty(5 * (49 + 2 * keys), 8), 49, keys):
        assert part.is_contiguous()


@pytest.mark.parametrize("side", [14, 28])
@pytest.mark.parametrize("images", [1, 3])
def test_the_backward_pass_leaves_its_inputs_alone(side: int, images: int) -> None:
    """Gradients are written over copies: asked for again, with strided inputs too, they are the same."""
    table = _ring_pooled_keys(RingPooledKeys(7, 3, 5, 1), side, side, CPU).table
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(images, tokens_of(table, 1), 3, 2, 16, generator=generator, requires_grad=True)
    bias = torch.randn(2, 1, 49, table.index.shape[1], generator=generator, requires_grad=True)
    out = focal_attention(wide[..., ::2], table, bias, 0.3, "sdpa")
    slopes = torch.randn(*out.shape[:2], 2 * out.shape[2], generator=generator)[..., ::2]
    kept = slopes.clone()
    first, second = (torch.autograd.grad(out, (wide, bias), slopes, retain_graph=True) for _ in range(2))
    assert torch.equal(slopes, kept)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    exact = torch.autograd.grad(
        focal_attention(wide[..., ::2], table, bias, 0.3, "reference"), (wide, bias), slopes
    )
    for ours, its in zip(first, exact, strict=True):
        torch.testing.assert_close(ours, its, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("height", "width"), MAPS)
def test_ring_and_pooled_keys_against_the_definition(height, width) -> None:
    """Every slot of every window, one by one, as the paper's figure 3 and the release have it."""
    s, e, f, levels = 7, 3, 3, 2
    table = _ring_pooled_keys(RingPooledKeys(s, e, f, levels), height, width, CPU).table
    padded_h, padded_w = -(-height // s) * s, -(-width // s) * s
    assert (table.height, table.width) == (padded_h, padded_w)
    for number, (i, j) in enumerate(itertools.product(range(padded_h // s), range(padded_w // s))):
        slots = [(i * s + y, j * s + x) for y in range(s) for x in range(s)]
        for dy, dx in ((e, e), (e, -e), (-e, e), (-e, -e)):
            for y, x in itertools.product(range(s), range(s)):
                if (y >= s - e if dy > 0 else y < e) or (x >= s - e if dx > 0 else x < e):
                    slots.append(((i * s + y + dy) % padded_h, (j * s + x + dx) % padded_w))
        expected = [y * padded_w + x for y, x in slots]
        seen = [True] * len(expected)
        offset = padded_h * padded_w
        for k in range(levels):
            m, gh, gw = f + 2**k - 1, padded_h // s * 2**k, padded_w // s * 2**k
            c = (2 * (f // 2) + 2**k + 2**k - 1) // 2 - (2**k - 1)
            for a, b in itertools.product(range(m), range(m)):
                y, x = i * 2**k - c + a, j * 2**k - c + b
                inside = 0 <= y < gh and 0 <= x < gw
                seen.append(inside)
                expected.append(offset + y * gw + x if inside else 0)
            offset += gh * gw
        assert table.index[number].tolist() == expected
        visible = [True] * len(expected) if table.visible is None else table.visible[number, 0].tolist()
        assert visible == seen


def test_key_counts_at_224() -> None:
    """230 / 206 / 190 / 50 keys as defined, 218 / 194 / 178 / 50 after folding."""
    counts = []
    for side, f, e in ((56, 7, 3), (28, 5, 3), (14, 3, 3), (7, 1, 0)):
        table = _ring_pooled_keys(RingPooledKeys(7, e, f, 1), side, side, CPU).table
        counts.append((table.index.shape[1], table.folded_index.shape[1], table.dense is not None))
    assert counts == [(230, 218, False), (206, 194, False), (190, 178, True), (50, 50, True)]


@pytest.mark.parametrize("pooled_levels", [0, 1])
@pytest.mark.parametrize("shift", [0, 3])
def test_keys_are_filled_up_where_the_cpu_gathers_them(pooled_levels: int, shift: int) -> None:
    """To whole vectors, with keys that nobody sees; elsewhere the folded keys are gathered."""
    selection = RingPooledKeys(7, 3, 7, pooled_levels, shift)
    for side in (14, 28, 35):
        table = _ring_pooled_keys(selection, side, side, CPU).table
        keys, filled = table.folded_index.shape[1], table.gathered_index.shape[1]
        assert keys <= filled < keys + KEYS_MULTIPLE
        assert torch.equal(table.gathered_index[:, :keys], table.folded_index)
        assert filled == keys if table.dense is not None else filled % KEYS_MULTIPLE == 0
        if filled > keys:
            assert table.gathered_visible is not None and not table.gathered_visible[..., keys:].any()
        assert int((table.readers % filled).max()) < keys
        elsewhere = _ring_pooled_keys(selection, side, side, torch.device("meta")).table
        assert elsewhere.gathered_index.shape[1] == keys


@pytest.mark.parametrize(
    ("keys", "filled"), [(17, 17), (112, 112), (113, 113), (114, 128), (128, 128), (218, 224)]
)
def test_few_keys_are_not_filled_up(keys: int, filled: int) -> None:
    """What is added is at most an eighth, and repeats tokens that the window reads anyway."""
    index, visible = fill_up(np.arange(2 * keys).reshape(2, keys), None, 16)
    assert index.shape == (2, filled)
    assert (index[:, keys:] == index[:, keys - 1 : keys]).all()
    assert (visible is None) == (filled == keys)
    if visible is not None:
        assert visible[..., :keys].all() and not visible[..., keys:].any()


@pytest.mark.parametrize("size", [(1, 1), (7, 7), (5, 40), (30, 3), (20, 31)], ids=str)
@pytest.mark.parametrize("count", [1, 5, 40, 128])
def test_nearest_cells_against_a_full_sort(size, count) -> None:
    count = min(count, size[0] * size[1])
    centres = grid(-(-size[0] // 7), -(-size[1] // 7)) * 7 + 3
    cells = grid(*size)
    distance = ((centres[:, None] - cells[None]) ** 2).sum(-1)
    expected = np.argsort(distance, axis=1, kind="stable")[:, :count]
    assert np.array_equal(nearest_cells(centres, *size, count), expected)


def test_focal_fast_never_sees_padding() -> None:
    for height, width in ((8, 8), (15, 9), (1, 1), (3, 30)):
        table = _nearest_keys(NearestKeys(7, 128, 1, (14, 14)), height, width, CPU).table
        fine = table.index[:, : min(128, height * width)]
        assert (fine // table.width < height).all() and (fine % table.width < width).all()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("compiled", [False, True])
def test_training_keeps_no_gathered_keys(device, compiled) -> None:
    """What sdpa saves for the backward pass is its input, bias and output, here and on other devices."""
    table = _ring_pooled_keys(RingPooledKeys(7, 3, 7, 1), 28, 28, torch.device(device)).table
    qkv = torch.randn(8, tokens_of(table, 1), 3, 2, 8, device=device, requires_grad=True)
    bias = torch.randn(2, 16, 49, table.index.shape[1], device=device, requires_grad=True)
    saved = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.is_floating_point():
            saved[id(x.untyped_storage())] = x.untyped_storage().nbytes()
        return x

    module = PORTABLE_BACKENDS["sdpa"]
    prepared = module.prepare_bias(bias, table, torch.float32)

    def attend(qkv: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return module.attend(qkv, table, bias, 0.4)

    if compiled:
        torch.compiler.reset()
        attend = torch.compile(attend, backend="aot_eager_decomp_partition", fullgraph=True, dynamic=False)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = attend(qkv, prepared)
    assert sum(saved.values()) <= sum(x.untyped_storage().nbytes() for x in (qkv, prepared, out))


def test_the_choice_of_a_backend() -> None:
    for name in ("reference", "sdpa"):
        assert resolve_backend(name, CPU, torch.float32, 32, 7) == name
    assert resolve_backend("auto", CPU, torch.float32, 32, 7) == "sdpa"
    assert resolve_backend("auto", torch.device("meta"), torch.float32, 32, 7) == "sdpa"
    with pytest.raises(ValueError, match="choose one of auto, reference, sdpa, triton"):
        resolve_backend("flash", CPU, torch.float32, 32, 7)
    with pytest.raises(ValueError, match="triton.*: (use|install)"):
        resolve_backend("triton", CPU, torch.float32, 32, 7)
