"""The kernels of `triton_kernel`: what one program computes, in Triton's language.

Offsets within an image are 32-bit numbers, kept apart from 64-bit base pointers: that saves the registers
which decide whether a kernel spills (`triton_launch.check_offsets` guards them).

Legend: as `triton_kernel`.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "the attention backend 'triton' needs the package triton (pip install triton; PyTorch for CUDA on "
        "Linux brings it): install it or choose the backend 'sdpa'"
    ) from error

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.0e30)  # a finite "no score yet", so that nothing but absent keys gives no NaN

SIZES = (
    *("slices", "slice_items", "items", "group_windows", "windows", "map_width", "heads"),
    *("heavy", "blocks", "images"),
)
"""Arguments whose value, such as 1 or a multiple of 16, makes no kernel of its own."""


@triton.jit
def _place(heads, parts):
    """Head, part and remaining place of this program. One axis, since others end at 65535 programs; heads and
    parts of a window come next to each other, so that its rows are read while they are in the cache."""
    place = tl.program_id(0) // heads
    return tl.program_id(0) % heads, place % parts, place // parts


@triton.jit
def _window_tokens(window, query, map_width, SIDE: tl.constexpr, QUERIES: tl.constexpr):
    """Token of every query of a window; that of the last one beyond the end."""
    query = tl.minimum(query, QUERIES - 1)
    windows_across = map_width // SIDE
    first = (window // windows_across) * (SIDE * map_width) + (window % windows_across) * SIDE
    return first + (query // SIDE) * map_width + query % SIDE


@triton.jit
def _row_offsets(token, stride, BLOCK_D: tl.constexpr):
    """Offsets of one head's channels of some tokens, [rows, BLOCK_D]; of token 0 where there is none (-1)."""
    return tl.maximum(token, 0)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _load_rows(base, token, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """One head's channels of some tokens: [rows, BLOCK_D], 0 beyond HEAD_DIM."""
    offset = _row_offsets(token, stride, BLOCK_D)
    if HEAD_DIM == BLOCK_D:
        return tl.load(base + offset)
    else:
        return tl.load(base + offset, mask=(tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _store_rows(base, value, token, stride, real, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write what `_load_rows` reads, for the rows that are real."""
    mask = real[:, None] & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    tl.store(base + _row_offsets(token, stride, BLOCK_D), value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _forward_tile(
    top, total, out, q, bias_ptr, k_base, v_base, k_token, v_token, key_ptr, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: maximum and sum [queries] and output [queries, BLOCK_D] so far."""
    key = tl.load(key_ptr)
    k = _load_rows(k_base, key, k_token, HEAD_DIM, BLOCK_D)
    v = _load_rows(v_base, key, v_token, HEAD_DIM, BLOCK_D)
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + tl.load(bias_ptr).to(tl.float32)
    score = tl.where((key >= 0)[None, :], score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, 1))
    weight = tl.exp2(score * LOG2E - (new_top * LOG2E)[:, None])
    shrink = tl.exp2((top - new_top) * LOG2E)
    out = out * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision=PRECISION)
    return new_top, total * shrink + tl.sum(weight, 1), out


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, index_ptr, out_ptr, lse_ptr,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    slices, slice_items, items, group_windows, windows, row_keys, map_width, heads, scale,
    SIDE: tl.constexpr, QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, Q_BLOCKS: tl.constexpr, TILES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp (base 2) of a slice of the items of one group, head and block of queries.

    Grid, as `_place` takes it apart: groups * slices * Q_BLOCKS * heads.
    """
    head, query_block, place = _place(heads, Q_BLOCKS)
    group = place // slices
    first = place % slices * slice_items
    query = query_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    real = query < QUERIES
    column = tl.arange(0, BLOCK_K)
    bias_size = Q_BLOCKS * BLOCK_Q * row_keys
    bias = bias_ptr + (head * (windows // group_windows) + group).to(tl.int64) * bias_size
    bias += query[:, None] * row_keys + column[None, :]
    for item in range(first, tl.minimum(first + slice_items, items)):
        image = (item // group_windows).to(tl.int64)
        window = group + item % group_windows
        token = _window_tokens(window, query, map_width, SIDE, QUERIES)
        k_base = k_ptr + image * k_batch + head * k_head
        v_base = v_ptr + image * v_batch + head * v_head
        q = _load_rows(q_ptr + image * q_batch + head * q_head, token, q_token, HEAD_DIM, BLOCK_D)
        key = index_ptr + window * row_keys + column
        top = tl.full([BLOCK_Q], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        out = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        for tile in range(TILES):
            top, total, out = _forward_tile(
                top, total, out, q, bias + tile * BLOCK_K, k_base, v_base, k_token, v_token,
                key + tile * BLOCK_K, scale, HEAD_DIM, BLOCK_D, PRECISION,
            )  # fmt: skip
        total = tl.where(total > 0.0, total, 1.0)
        out_base = out_ptr + (image * (windows * QUERIES) * heads + head) * HEAD_DIM
        _store_rows(out_base, out / total[:, None], token, heads * HEAD_DIM, real, HEAD_DIM, BLOCK_D)
        lse_base = lse_ptr + ((image * heads + head) * windows + window) * QUERIES
        tl.store(lse_base + query, top * LOG2E + tl.log2(total), mask=real)


@triton.jit
def _query_step(
    dq, q, d_out, lse, delta, bias_ptr, k_base, v_base, k_token, v_token, key_ptr, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries with one more tile of keys, and the gradient of its scores, [keys, queries].

    Keys come first so that the tile is tall: eight warps share 128 rows, where 64 queries would feed four.
    """
    key = tl.load(key_ptr)
    k = _load_rows(k_base, key, k_token, HEAD_DIM, BLOCK_D)
    v = _load_rows(v_base, key, v_token, HEAD_DIM, BLOCK_D)
    score = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale + tl.load(bias_ptr).to(tl.float32)
    weight = tl.where((key >= 0)[:, None], tl.exp2(score * LOG2E - lse[None, :]), 0.0)
    d_weight = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
    d_score = weight * (d_weight - delta[None, :])
    return dq + tl.dot(tl.trans(d_score.to(k.dtype)), k, input_precision=PRECISION), d_score


@triton.jit(do_not_specialize=SIZES)
def query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, index_ptr, out_ptr, d_out_ptr, lse_ptr, delta_ptr, dq_ptr, d_bias_ptr,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    d_out_batch, d_out_token, dq_batch, dq_token, dq_head,
    slices, slice_items, items, group_windows, windows, row_keys, map_width, heads, scale,
    SIDE: tl.constexpr, QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, Q_BLOCKS: tl.constexpr, TILES: tl.constexpr,
    WITH_BIAS: tl.constexpr, WITH_QUERY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and bias over a slice of the items of one group, head and block of queries.

    bias is [N, groups, keys, queries] and d_bias [slices, N, groups, keys, queries], padded. WITH_BIAS: at
    most two tiles of keys, whose bias gradient stays in registers. Where there are more keys, each chunk of
    `TILES` tiles has programs of its own, and a launch without WITH_BIAS finds the gradient of the queries.
    WITH_QUERY also writes `delta`, the sum over channels of output times its gradient.

    Grid, as `_place` takes it apart: groups * slices * chunks of keys * Q_BLOCKS * heads.
    """
    head, part_of_tile, place = _place(heads, row_keys // (TILES * BLOCK_K) * Q_BLOCKS)
    group = place // slices
    part = place % slices
    first = part * slice_items
    query = part_of_tile % Q_BLOCKS * BLOCK_Q + tl.arange(0, BLOCK_Q)
    column = part_of_tile // Q_BLOCKS * (TILES * BLOCK_K) + tl.arange(0, BLOCK_K)
    real = query < QUERIES
    groups = windows // group_windows
    bias_size = Q_BLOCKS * BLOCK_Q * row_keys
    bias_offset = column[:, None] * (Q_BLOCKS * BLOCK_Q) + query[None, :]
    bias = bias_ptr + (head * groups + group).to(tl.int64) * bias_size + bias_offset
    step_bias: tl.constexpr = BLOCK_K * Q_BLOCKS * BLOCK_Q
    d_bias_0 = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
    d_bias_1 = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
    for item in range(first, tl.minimum(first + slice_items, items)):
        image = (item // group_windows).to(tl.int64)
        window = group + item % group_windows
        token = _window_tokens(window, query, map_width, SIDE, QUERIES)
        k_base = k_ptr + image * k_batch + head * k_head
        v_base = v_ptr + image * v_batch + head * v_head
        q = _load_rows(q_ptr + image * q_batch + head * q_head, token, q_token, HEAD_DIM, BLOCK_D)
        out_base = out_ptr + (image * (windows * QUERIES) * heads + head) * HEAD_DIM
        out = _load_rows(out_base, token, heads * HEAD_DIM, HEAD_DIM, BLOCK_D)
        d_out_base = d_out_ptr + image * d_out_batch + head * HEAD_DIM
        d_out = _load_rows(d_out_base, token, d_out_token, HEAD_DIM, BLOCK_D)
        delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
        row = ((image * heads + head) * windows + window) * QUERIES
        lse = tl.load(lse_ptr + row + query, mask=real, other=float("inf"))
        key = index_ptr + window * row_keys + column
        dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        if WITH_BIAS:
            dq, d_score = _query_step(
                dq, q, d_out, lse, delta, bias, k_base, v_base, k_token, v_token, key, scale,
                HEAD_DIM, BLOCK_D, PRECISION,
            )  # fmt: skip
            d_bias_0 += d_score
            if TILES > 1:
                dq, d_score = _query_step(
                    dq, q, d_out, lse, delta, bias + step_bias, k_base, v_base, k_token, v_token,
                    key + BLOCK_K, scale, HEAD_DIM, BLOCK_D, PRECISION,
                )  # fmt: skip
                d_bias_1 += d_score
        else:
            for tile in range(TILES):
                dq, d_score = _query_step(
                    dq, q, d_out, lse, delta, bias + tile * step_bias, k_base, v_base, k_token, v_token,
                    key + tile * BLOCK_K, scale, HEAD_DIM, BLOCK_D, PRECISION,
                )  # fmt: skip
        if WITH_QUERY:
            dq_base = dq_ptr + image * dq_batch + head * dq_head
            _store_rows(dq_base, dq * scale, token, dq_token, real, HEAD_DIM, BLOCK_D)
            tl.store(delta_ptr + row + query, delta, mask=real)
    if WITH_BIAS:
        d_bias = d_bias_ptr + ((part * heads + head) * groups + group).to(tl.int64) * bias_size + bias_offset
        tl.store(d_bias, d_bias_0)
        if TILES > 1:
            tl.store(d_bias + step_bias, d_bias_1)


@triton.jit(do_not_specialize=SIZES)
def key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, d_out_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    block_token_ptr, entry_start_ptr, entry_window_ptr, entry_column_ptr,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    d_out_batch, d_out_token, dk_batch, dk_token, dk_head,
    heavy, blocks, images, group_windows, windows, row_keys, map_width, heads, scale,
    SIDE: tl.constexpr, QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, Q_BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys and values of one block of tokens, image and head.

    bias is [N, groups, keys, queries], padded: the keys of a block are whole rows of it. Grid: blocks *
    images * heads; the heavy blocks of all images first, as they take longest; then image by image, so that
    windows are read while they are in the cache.
    """
    head = tl.program_id(0) % heads
    place = tl.program_id(0) // heads
    late = place - heavy * images
    light = tl.maximum(blocks - heavy, 1)
    block = tl.where(late < 0, place // images, heavy + late % light)
    image = tl.where(late < 0, place % images, late // light).to(tl.int64)
    q_base = q_ptr + image * q_batch + head * q_head
    d_out_base = d_out_ptr + image * d_out_batch + head * HEAD_DIM
    row_base = (image * heads + head) * windows * QUERIES
    groups = windows // group_windows
    bias_size = (row_keys * Q_BLOCKS * BLOCK_Q).to(tl.int64)
    bias_base = bias_ptr + (head * groups) * bias_size
    slot = tl.arange(0, BLOCK_K)
    token = tl.load(block_token_ptr + block * BLOCK_K + slot)
    k = _load_rows(k_ptr + image * k_batch + head * k_head, token, k_token, HEAD_DIM, BLOCK_D)
    v = _load_rows(v_ptr + image * v_batch + head * v_head, token, v_token, HEAD_DIM, BLOCK_D)
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    start = tl.load(entry_start_ptr + block) * Q_BLOCKS
    stop = tl.load(entry_start_ptr + block + 1) * Q_BLOCKS
    for step in range(start, stop):
        entry = step // Q_BLOCKS
        window = tl.load(entry_window_ptr + entry)
        column = tl.load(entry_column_ptr + entry * BLOCK_K + slot)
        query = step % Q_BLOCKS * BLOCK_Q + tl.arange(0, BLOCK_Q)
        real = query < QUERIES
        q_rows = _window_tokens(window, query, map_width, SIDE, QUERIES)
        q = _load_rows(q_base, q_rows, q_token, HEAD_DIM, BLOCK_D)
        d_out = _load_rows(d_out_base, q_rows, d_out_token, HEAD_DIM, BLOCK_D)
        row = row_base + window * QUERIES
        lse = tl.load(lse_ptr + row + query, mask=real, other=float("inf"))
        delta = tl.load(delta_ptr + row + query, mask=real, other=0.0)
        bias_rows = bias_base + window // group_windows * bias_size
        bias_offset = tl.maximum(column, 0)[:, None] * (Q_BLOCKS * BLOCK_Q) + query[None, :]
        bias = tl.load(bias_rows + bias_offset).to(tl.float32)
        score = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale + bias
        weight = tl.where((column >= 0)[:, None], tl.exp2(score * LOG2E - lse[None, :]), 0.0)
        dv += tl.dot(weight.to(d_out.dtype), d_out, input_precision=PRECISION)
        d_weight = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
        d_score = weight * (d_weight - delta[None, :])
        dk += tl.dot(d_score.to(q.dtype), q, input_precision=PRECISION)
    offset = image * dk_batch + head * dk_head
    _store_rows(dk_ptr + offset, dk * scale, token, dk_token, token >= 0, HEAD_DIM, BLOCK_D)
    _store_rows(dv_ptr + offset, dv, token, dk_token, token >= 0, HEAD_DIM, BLOCK_D)


INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)
"""TRITON_INTERPRET was set when this module was imported: the kernels run on CPU tensors, slowly."""
