"""The kernels: what one program computes, in Triton's language.

What costs time on a GPU is not the products but every instruction spent on a score, so a score costs few:

* The bias is added by the tensor cores: `bias @ identity` is where the sum of a score begins. It arrives
  divided by the factor of the scores, lies in shared memory for all items of a program, and meets no other
  instruction. That factor is part of the exponential: one multiplication and addition.
* The gradient of the bias is summed by them too, as `d_score @ identity` onto what stays in registers.
  (In float32 both are plain sums: there an identity would cost three products, and bits.)
* Absent keys that all windows lack are masked by the bias; others only in tiles that have some (`PLAIN`).
* Where registers suffice (`STATIC`), all scores of a row are found before one maximum is taken of them. Its
  tiles are written out, since Triton has no lists of tensors before release 3.3, and fetched together, so
  that a program waits for memory once an item.
* Heads, widths and row lengths are known at compile time, so that addresses are sums with constants.

Offsets within an image are 32-bit numbers, kept apart from 64-bit base pointers: that saves the registers
which decide whether a kernel spills (`launch.check_offsets` guards them).

Legend: as in `launch`. Names ending in `_ptr` are arrays, capitals are known at compile time: QUERIES_PADDED
and ROW are the queries and keys of a group's bias, padded; SHARED: all windows share it; WIDTH = HEADS *
HEAD_DIM, a token of `qkv` has three times that.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "needs the package triton (pip install triton; PyTorch for CUDA on Linux brings it)"
    ) from error

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.0e38)  # a finite "no score yet", below all scores

SIZES = ("tokens", "slices", "slice_items", "items", "first_tile", "blocks", "windows", "map_width")
"""Arguments that do not compile one kernel per value, such as 1 or a multiple of 16."""


@triton.jit
def _place(HEADS: tl.constexpr, PARTS: tl.constexpr):
    """Head, part and remaining place of this program. One axis, since others end at 65535 programs; heads and
    parts of a window come next to each other, so that its rows are read while they are in the cache."""
    place = tl.program_id(0) // HEADS
    return tl.program_id(0) % HEADS, place % PARTS, place // PARTS


@triton.jit
def _query_tokens(query, map_width, SIDE: tl.constexpr):
    """Token of every query of a window, counted from its first; that of the last one beyond the end."""
    query = tl.minimum(query, SIDE * SIDE - 1)
    return query // SIDE * map_width + query % SIDE


@triton.jit
def _load_rows(base, offset, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """One head's channels of some tokens: [rows, BLOCK_D], 0 beyond HEAD_DIM."""
    channel = tl.arange(0, BLOCK_D)
    if HEAD_DIM == BLOCK_D:
        return tl.load(base + (offset[:, None] + channel[None, :]))
    else:
        mask = (channel < HEAD_DIM)[None, :]
        return tl.load(base + (offset[:, None] + channel[None, :]), mask=mask, other=0.0)


@triton.jit
def _store_rows(base, value, offset, real, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write what `_load_rows` reads, for the rows that are real."""
    channel = tl.arange(0, BLOCK_D)
    mask = real[:, None] & (channel < HEAD_DIM)[None, :]
    tl.store(base + (offset[:, None] + channel[None, :]), value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _identity(SIZE: tl.constexpr, dtype: tl.constexpr):
    """The identity matrix; the compiler keeps it in shared memory."""
    number = tl.arange(0, SIZE)
    # Not a conversion of the bool: Triton 3.2 crashes on it.
    return tl.where(number[:, None] == number[None, :], 1.0, 0.0).to(dtype)


@triton.jit
def _bias_tile(bias, TILE: tl.constexpr, KEYS: tl.constexpr, BLOCK_K: tl.constexpr):
    """One tile of a bias of KEYS keys, [queries, BLOCK_K] or what is left for the last one, if there is such
    a tile. Loaded before a loop it stays at hand."""
    if TILE * BLOCK_K < KEYS:
        SIZE: tl.constexpr = BLOCK_K if TILE * BLOCK_K + BLOCK_K <= KEYS else KEYS - TILE * BLOCK_K
        return tl.load(bias + TILE * BLOCK_K + tl.arange(0, SIZE)[None, :])
    else:
        return 0.0


@triton.jit
def _fetch(
    base, key_ptr, bias, TILE: tl.constexpr, KEYS: tl.constexpr, PLAIN: tl.constexpr, BLOCK_K: tl.constexpr,
    WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Tokens of one tile, if there is such a tile, and its keys and values [keys, BLOCK_D].

    Args:
        base: this head's queries of the image's first token.
        key_ptr: token of every key of the window; -1, where there is none, from tile PLAIN on.
        bias: the tile of `_bias_tile`.
    """
    if TILE * BLOCK_K < KEYS:
        key = tl.load(key_ptr + TILE * BLOCK_K + tl.arange(0, bias.shape[1]))
        offset = (tl.maximum(key, 0) if TILE >= PLAIN else key) * (3 * WIDTH)
        k = _load_rows(base + WIDTH, offset, HEAD_DIM, BLOCK_D)
        v = _load_rows(base + 2 * WIDTH, offset, HEAD_DIM, BLOCK_D)
        return key, k, v
    else:
        return 0, 0.0, 0.0


@triton.jit
def _biased_product(a, b, bias, PRECISION: tl.constexpr):
    """Scores, without the scale, which `_weight` multiplies by.

    Args:
        a, b: [rows, BLOCK_D] and [BLOCK_D, columns], queries and keys or the other way around.
        bias: [rows, columns], as `bias.prepare` makes it.
    """
    if bias.dtype == tl.float32:
        return tl.dot(a, b, input_precision=PRECISION) + bias
    else:
        biased = tl.dot(bias, _identity(bias.shape[1], bias.dtype), input_precision=PRECISION)
        return tl.dot(a, b, acc=biased, input_precision=PRECISION)


@triton.jit
def _weight(score, row, scale):
    """Exponential of scores less one number of their row; `scale` brings scores to base 2, as `row` is."""
    return tl.exp2(score * scale - row)


@triton.jit
def _tile_scores(
    q, k, key, bias, TILE: tl.constexpr, KEYS: tl.constexpr, PLAIN: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of one tile of keys [queries, keys], -inf for absent ones, if there is such a tile."""
    if TILE * BLOCK_K < KEYS:
        score = _biased_product(q, tl.trans(k), bias, PRECISION)
        return tl.where((key >= 0)[None, :], score, float("-inf")) if TILE >= PLAIN else score
    else:
        return 0.0


@triton.jit
def _largest(top, score, TILE: tl.constexpr, KEYS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Maximum of every row so far and of one more tile, if there is such a tile."""
    if TILE * BLOCK_K < KEYS:
        return tl.maximum(top, tl.max(score, 1))
    else:
        return top


@triton.jit
def _add_tile(
    total, out, score, v, row, scale, TILE: tl.constexpr, KEYS: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum of weights [queries] and output [queries, BLOCK_D] with one more tile, if there is such a tile."""
    if TILE * BLOCK_K < KEYS:
        weight = _weight(score, row[:, None], scale)
        return total + tl.sum(weight, 1), tl.dot(weight.to(v.dtype), v, acc=out, input_precision=PRECISION)
    else:
        return total, out


@triton.jit
def _online_tile(
    row, total, out, q, bias, base, key_ptr, scale, KEYS: tl.constexpr, WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: maximum, sum of weights and output of every row so far, with KEYS more
    keys, if there are any."""
    if KEYS > 0:
        tile = _bias_tile(bias, 0, KEYS, KEYS)
        key, k, v = _fetch(base, key_ptr, tile, 0, KEYS, 0, KEYS, WIDTH, HEAD_DIM, BLOCK_D)
        score = _tile_scores(q, k, key, tile, 0, KEYS, 0, KEYS, PRECISION)
        larger = tl.maximum(row, tl.max(score, 1) * scale)
        shrink = tl.exp2(row - larger)
        out *= shrink[:, None]
        total, out = _add_tile(total * shrink, out, score, v, larger, scale, 0, KEYS, KEYS, PRECISION)
        return larger, total, out
    else:
        return row, total, out


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    qkv_ptr, bias_ptr, index_ptr, first_ptr, out_ptr, lse_ptr,
    tokens, slices, slice_items, items, windows, map_width, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SIDE: tl.constexpr, SHARED: tl.constexpr,
    ROW: tl.constexpr, BLOCK_Q: tl.constexpr, Q_BLOCKS: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, KEYS: tl.constexpr, PLAIN: tl.constexpr, STATIC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of a slice of the items of one group, head and block of queries.

    Keys are tiles of BLOCK_K, and a smaller one for the rest. STATIC: they are at most four, and the bias
    stays at hand; else the softmax is online. The first PLAIN tiles have no absent key. Grid, as `_place`
    takes it apart: groups * slices * Q_BLOCKS * HEADS.
    """
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    QUERIES_PADDED: tl.constexpr = Q_BLOCKS * BLOCK_Q
    KEPT: tl.constexpr = KEYS if STATIC else 0
    head, query_block, place = _place(HEADS, Q_BLOCKS)
    group = place // slices
    first = place % slices * slice_items
    query = query_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    real = query < SIDE * SIDE
    query_token = _query_tokens(query, map_width, SIDE)
    bias = bias_ptr + (head if SHARED else head * windows + group).to(tl.int64) * (QUERIES_PADDED * ROW)
    bias += query[:, None] * ROW
    bias_0 = _bias_tile(bias, 0, KEPT, BLOCK_K)
    bias_1 = _bias_tile(bias, 1, KEPT, BLOCK_K)
    bias_2 = _bias_tile(bias, 2, KEPT, BLOCK_K)
    bias_3 = _bias_tile(bias, 3, KEPT, BLOCK_K)
    image = first // windows if SHARED else first
    window = first % windows if SHARED else group
    for _item in range(first, tl.minimum(first + slice_items, items)):
        base = qkv_ptr + (image.to(tl.int64) * tokens * (3 * WIDTH) + head * HEAD_DIM)
        token = tl.load(first_ptr + window) + query_token
        q = _load_rows(base, token * (3 * WIDTH), HEAD_DIM, BLOCK_D)
        key = index_ptr + window * ROW
        total = tl.zeros([BLOCK_Q], tl.float32)
        out = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        if STATIC:
            key_0, k_0, v_0 = _fetch(base, key, bias_0, 0, KEYS, PLAIN, BLOCK_K, WIDTH, HEAD_DIM, BLOCK_D)
            key_1, k_1, v_1 = _fetch(base, key, bias_1, 1, KEYS, PLAIN, BLOCK_K, WIDTH, HEAD_DIM, BLOCK_D)
            key_2, k_2, v_2 = _fetch(base, key, bias_2, 2, KEYS, PLAIN, BLOCK_K, WIDTH, HEAD_DIM, BLOCK_D)
            key_3, k_3, v_3 = _fetch(base, key, bias_3, 3, KEYS, PLAIN, BLOCK_K, WIDTH, HEAD_DIM, BLOCK_D)
            score_0 = _tile_scores(q, k_0, key_0, bias_0, 0, KEYS, PLAIN, BLOCK_K, PRECISION)
            score_1 = _tile_scores(q, k_1, key_1, bias_1, 1, KEYS, PLAIN, BLOCK_K, PRECISION)
            score_2 = _tile_scores(q, k_2, key_2, bias_2, 2, KEYS, PLAIN, BLOCK_K, PRECISION)
            score_3 = _tile_scores(q, k_3, key_3, bias_3, 3, KEYS, PLAIN, BLOCK_K, PRECISION)
            row = _largest(tl.max(score_0, 1), score_1, 1, KEYS, BLOCK_K)
            row = _largest(row, score_2, 2, KEYS, BLOCK_K)
            row = _largest(row, score_3, 3, KEYS, BLOCK_K) * scale
            total, out = _add_tile(total, out, score_0, v_0, row, scale, 0, KEYS, BLOCK_K, PRECISION)
            total, out = _add_tile(total, out, score_1, v_1, row, scale, 1, KEYS, BLOCK_K, PRECISION)
            total, out = _add_tile(total, out, score_2, v_2, row, scale, 2, KEYS, BLOCK_K, PRECISION)
            total, out = _add_tile(total, out, score_3, v_3, row, scale, 3, KEYS, BLOCK_K, PRECISION)
        else:
            row = tl.full([BLOCK_Q], LOWEST, tl.float32)
            for start in range(0, KEYS // BLOCK_K * BLOCK_K, BLOCK_K):
                row, total, out = _online_tile(
                    row, total, out, q, bias + start, base, key + start, scale,
                    BLOCK_K, WIDTH, HEAD_DIM, BLOCK_D, PRECISION,
                )  # fmt: skip
            rest = KEYS // BLOCK_K * BLOCK_K
            row, total, out = _online_tile(
                row, total, out, q, bias + rest, base, key + rest, scale,
                KEYS % BLOCK_K, WIDTH, HEAD_DIM, BLOCK_D, PRECISION,
            )  # fmt: skip
        out_base = out_ptr + (image.to(tl.int64) * windows * (SIDE * SIDE * WIDTH) + head * HEAD_DIM)
        _store_rows(out_base, out * (1.0 / total)[:, None], token * WIDTH, real, HEAD_DIM, BLOCK_D)
        lse = row + tl.log2(total)
        number = ((image * HEADS + head).to(tl.int64) * windows + window) * QUERIES_PADDED + query
        tl.store(lse_ptr + number, tl.where(real, lse, float("inf")))
        image, window = _next_item(image, window, windows, SHARED)


@triton.jit
def _next_item(image, window, windows, SHARED: tl.constexpr):
    """Image and window of the next item of a group."""
    if SHARED:
        window += 1
        is_end = window == windows
        return tl.where(is_end, image + 1, image), tl.where(is_end, 0, window)
    else:
        return image + 1, window


@triton.jit
def _gradient_tile(
    dq, d_bias, q, d_out, lse, delta, bias, base, key_ptr, scale, TILE: tl.constexpr, KEYS: tl.constexpr,
    PLAIN: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and of the bias with one more tile of keys, if there is such a tile."""
    if TILE * BLOCK_K < KEYS:
        key, k, v = _fetch(base, key_ptr, bias, TILE, KEYS, PLAIN, BLOCK_K, WIDTH, HEAD_DIM, BLOCK_D)
        score = _tile_scores(q, k, key, bias, TILE, KEYS, PLAIN, BLOCK_K, PRECISION)
        weight = _weight(score, lse[:, None], scale)
        d_weight = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
        d_score = (weight * (d_weight - delta[:, None])).to(k.dtype)
        if k.dtype == tl.float32:
            d_bias += d_score
        else:
            identity = _identity(bias.shape[1], k.dtype)
            d_bias = tl.dot(d_score, identity, acc=d_bias, input_precision=PRECISION)
        return tl.dot(d_score, k, acc=dq, input_precision=PRECISION), d_bias
    else:
        return dq, d_bias


@triton.jit
def _no_gradient(bias, TILE: tl.constexpr, KEYS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Where the gradient of one tile of the bias is summed, if there is such a tile."""
    if TILE * BLOCK_K < KEYS:
        return tl.zeros([bias.shape[0], bias.shape[1]], tl.float32)
    else:
        return 0.0


@triton.jit
def _store_tile(pointer, value, TILE: tl.constexpr, KEYS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Write one tile of the gradient of the bias, if there is such a tile."""
    if TILE * BLOCK_K < KEYS:
        tl.store(pointer + TILE * BLOCK_K + tl.arange(0, value.shape[1])[None, :], value)


@triton.jit(do_not_specialize=SIZES)
def query_gradient_kernel(
    qkv_ptr, bias_ptr, index_ptr, first_ptr, out_ptr, d_out_ptr, lse_ptr, delta_ptr, d_qkv_ptr, d_bias_ptr,
    tokens, slices, slice_items, items, first_tile, windows, map_width, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SIDE: tl.constexpr, SHARED: tl.constexpr,
    ROW: tl.constexpr, BLOCK_Q: tl.constexpr, Q_BLOCKS: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, KEYS: tl.constexpr, PLAIN: tl.constexpr, IS_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and bias over a slice of the items of one group, head and block of queries.

    d_bias is [slices, N, groups, queries, keys], padded. A launch has at most seven tiles of keys, from
    `first_tile` on, whose bias and bias gradient stay at hand; where there are more keys, further launches
    add to the gradient of the queries. IS_FIRST: this one starts it, and writes `delta`, the sum over
    channels of output times its gradient.

    Grid, as `_place` takes it apart: groups * slices * Q_BLOCKS * HEADS.
    """
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    QUERIES_PADDED: tl.constexpr = Q_BLOCKS * BLOCK_Q
    head, query_block, place = _place(HEADS, Q_BLOCKS)
    group = place // slices
    part = place % slices
    first = part * slice_items
    first_key = first_tile * BLOCK_K
    query = query_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    real = query < SIDE * SIDE
    query_token = _query_tokens(query, map_width, SIDE)
    bias_offset = (head if SHARED else head * windows + group).to(tl.int64) * (QUERIES_PADDED * ROW)
    bias = bias_ptr + bias_offset + (query[:, None] * ROW + first_key)
    bias_0 = _bias_tile(bias, 0, KEYS, BLOCK_K)
    bias_1 = _bias_tile(bias, 1, KEYS, BLOCK_K)
    bias_2 = _bias_tile(bias, 2, KEYS, BLOCK_K)
    bias_3 = _bias_tile(bias, 3, KEYS, BLOCK_K)
    bias_4 = _bias_tile(bias, 4, KEYS, BLOCK_K)
    bias_5 = _bias_tile(bias, 5, KEYS, BLOCK_K)
    bias_6 = _bias_tile(bias, 6, KEYS, BLOCK_K)
    sum_0 = _no_gradient(bias_0, 0, KEYS, BLOCK_K)
    sum_1 = _no_gradient(bias_1, 1, KEYS, BLOCK_K)
    sum_2 = _no_gradient(bias_2, 2, KEYS, BLOCK_K)
    sum_3 = _no_gradient(bias_3, 3, KEYS, BLOCK_K)
    sum_4 = _no_gradient(bias_4, 4, KEYS, BLOCK_K)
    sum_5 = _no_gradient(bias_5, 5, KEYS, BLOCK_K)
    sum_6 = _no_gradient(bias_6, 6, KEYS, BLOCK_K)
    image = first // windows if SHARED else first
    window = first % windows if SHARED else group
    for _item in range(first, tl.minimum(first + slice_items, items)):
        image_offset = image.to(tl.int64) * tokens * (3 * WIDTH) + head * HEAD_DIM
        out_offset = image.to(tl.int64) * windows * (SIDE * SIDE * WIDTH) + head * HEAD_DIM
        base = qkv_ptr + image_offset
        token = tl.load(first_ptr + window) + query_token
        q = _load_rows(base, token * (3 * WIDTH), HEAD_DIM, BLOCK_D)
        d_out = _load_rows(d_out_ptr + out_offset, token * WIDTH, HEAD_DIM, BLOCK_D)
        number = ((image * HEADS + head).to(tl.int64) * windows + window) * QUERIES_PADDED + query
        lse = tl.load(lse_ptr + number)
        if IS_FIRST:
            out = _load_rows(out_ptr + out_offset, token * WIDTH, HEAD_DIM, BLOCK_D)
            delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
        else:
            delta = tl.load(delta_ptr + number)
        key = index_ptr + (window * ROW + first_key)
        dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        dq, sum_0 = _gradient_tile(
            dq, sum_0, q, d_out, lse, delta, bias_0, base, key, scale, 0, KEYS, PLAIN, BLOCK_K,
            WIDTH, HEAD_DIM, BLOCK_D, PRECISION,
        )  # fmt: skip
        dq, sum_1 = _gradient_tile(
            dq, sum_1, q, d_out, lse, delta, bias_1, base, key, scale, 1, KEYS, PLAIN, BLOCK_K,
            WIDTH, HEAD_DIM, BLOCK_D, PRECISION,
        )  # fmt: skip
        dq, sum_2 = _gradient_tile(
            dq, sum_2, q, d_out, lse, delta, bias_2, base, key, scale, 2, KEYS, PLAIN, BLOCK_K,
            WIDTH, HEAD_DIM, BLOCK_D, PRECISION,
        )  # fmt: skip
        dq, sum_3 = _gradient_tile(
            dq, sum_3, q, d_out, lse, delta, bias_3, base, key, scale, 3, KEYS, PLAIN, BLOCK_K,
            WIDTH, HEAD_DIM, BLOCK_D, PRECISION,
        )  # fmt: skip
        dq, sum_4 = _gradient_tile(
            dq, sum_4, q, d_out, lse, delta, bias_4, base, key, scale, 4, KEYS, PLAIN, BLOCK_K,
            WIDTH, HEAD_DIM, BLOCK_D, PRECISION,
        )  # fmt: skip
        dq, sum_5 = _gradient_tile(
            dq, sum_5, q, d_out, lse, delta, bias_5, base, key, scale, 5, KEYS, PLAIN, BLOCK_K,
            WIDTH, HEAD_DIM, BLOCK_D, PRECISION,
        )  # fmt: skip
        dq, sum_6 = _gradient_tile(
            dq, sum_6, q, d_out, lse, delta, bias_6, base, key, scale, 6, KEYS, PLAIN, BLOCK_K,
            WIDTH, HEAD_DIM, BLOCK_D, PRECISION,
        )  # fmt: skip
        dq *= scale / LOG2E
        dq_base = d_qkv_ptr + image_offset
        if IS_FIRST:
            tl.store(delta_ptr + number, delta)
        else:
            dq += _load_rows(dq_base, token * (3 * WIDTH), HEAD_DIM, BLOCK_D).to(tl.float32)
        _store_rows(dq_base, dq, token * (3 * WIDTH), real, HEAD_DIM, BLOCK_D)
        image, window = _next_item(image, window, windows, SHARED)
    d_bias = d_bias_ptr + part.to(tl.int64) * (HEADS if SHARED else HEADS * windows) * (QUERIES_PADDED * ROW)
    d_bias += bias_offset + (query[:, None] * ROW + first_key)
    _store_tile(d_bias, sum_0, 0, KEYS, BLOCK_K)
    _store_tile(d_bias, sum_1, 1, KEYS, BLOCK_K)
    _store_tile(d_bias, sum_2, 2, KEYS, BLOCK_K)
    _store_tile(d_bias, sum_3, 3, KEYS, BLOCK_K)
    _store_tile(d_bias, sum_4, 4, KEYS, BLOCK_K)
    _store_tile(d_bias, sum_5, 5, KEYS, BLOCK_K)
    _store_tile(d_bias, sum_6, 6, KEYS, BLOCK_K)


@triton.jit(do_not_specialize=SIZES)
def key_gradient_kernel(
    qkv_ptr, bias_ptr, d_out_ptr, lse_ptr, delta_ptr, d_qkv_ptr,
    block_token_ptr, entry_start_ptr, entry_window_ptr, entry_first_ptr, entry_column_ptr,
    tokens, blocks, windows, map_width, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SIDE: tl.constexpr, SHARED: tl.constexpr,
    ROW: tl.constexpr, BLOCK_Q: tl.constexpr, Q_BLOCKS: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys and values of one block of tokens, image and head, and of the queries of coarse
    tokens, which are zero.

    bias is [N, groups, keys, queries], padded: the keys of a block are whole rows of it, and tokens that a
    window does not see have a row that no weight survives. Grid: images * blocks * HEADS, so that windows are
    read while they are in the cache.
    """
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    QUERIES_PADDED: tl.constexpr = Q_BLOCKS * BLOCK_Q
    head, _, place = _place(HEADS, 1)
    block, image = place % blocks, place // blocks
    image_offset = image.to(tl.int64) * tokens * (3 * WIDTH) + head * HEAD_DIM
    base = qkv_ptr + image_offset
    d_out_base = d_out_ptr + (image.to(tl.int64) * windows * (SIDE * SIDE * WIDTH) + head * HEAD_DIM)
    row_base = (image * HEADS + head).to(tl.int64) * windows * QUERIES_PADDED
    bias_base = bias_ptr + (head if SHARED else head * windows).to(tl.int64) * (QUERIES_PADDED * ROW)
    slot = tl.arange(0, BLOCK_K)
    token = tl.load(block_token_ptr + block * BLOCK_K + slot)
    offset = tl.maximum(token, 0) * (3 * WIDTH)
    k = _load_rows(base + WIDTH, offset, HEAD_DIM, BLOCK_D)
    v = _load_rows(base + 2 * WIDTH, offset, HEAD_DIM, BLOCK_D)
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    start = tl.load(entry_start_ptr + block) * Q_BLOCKS
    stop = tl.load(entry_start_ptr + block + 1) * Q_BLOCKS
    for step in range(start, stop):
        entry = step // Q_BLOCKS
        query = step % Q_BLOCKS * BLOCK_Q + tl.arange(0, BLOCK_Q)
        window = tl.load(entry_window_ptr + entry)
        query_token = tl.load(entry_first_ptr + entry) + _query_tokens(query, map_width, SIDE)
        column = tl.load(entry_column_ptr + entry * BLOCK_K + slot)
        q = _load_rows(base, query_token * (3 * WIDTH), HEAD_DIM, BLOCK_D)
        d_out = _load_rows(d_out_base, query_token * WIDTH, HEAD_DIM, BLOCK_D)
        lse = tl.load(lse_ptr + row_base + window * QUERIES_PADDED + query)
        delta = tl.load(delta_ptr + row_base + window * QUERIES_PADDED + query)
        bias_row = bias_base if SHARED else bias_base + window.to(tl.int64) * (QUERIES_PADDED * ROW)
        bias = tl.load(bias_row + (column[:, None] * QUERIES_PADDED + query[None, :]))
        score = _biased_product(k, tl.trans(q), bias, PRECISION)
        weight = _weight(score, lse[None, :], scale)
        dv = tl.dot(weight.to(d_out.dtype), d_out, acc=dv, input_precision=PRECISION)
        d_weight = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
        d_score = weight * (d_weight - delta[None, :])
        dk = tl.dot(d_score.to(q.dtype), q, acc=dk, input_precision=PRECISION)
    d_base, coarse = d_qkv_ptr + image_offset, token >= windows * (SIDE * SIDE)
    _store_rows(d_base, tl.zeros_like(dk), offset, coarse, HEAD_DIM, BLOCK_D)
    _store_rows(d_base + WIDTH, dk * (scale / LOG2E), offset, token >= 0, HEAD_DIM, BLOCK_D)
    _store_rows(d_base + 2 * WIDTH, dv, offset, token >= 0, HEAD_DIM, BLOCK_D)


INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)
"""TRITON_INTERPRET was set when this module was imported: the kernels run on CPU tensors, slowly."""
