"""The kernels: what one program computes, in Triton's language.

What costs time on a GPU is not the products but every instruction spent on a score, so a score costs few:

* The bias is added by the tensor cores: `bias @ identity` is where the sum of a score begins. It arrives
  divided by `scale`, lies in shared memory for all items of a program, and meets no other instruction.
* The gradient of the bias is summed by them too, as `d_score @ identity` onto what stays in registers.
  (In float32 both are plain sums: there an identity would cost three products, and bits.)
* Absent keys that all windows lack are masked by the bias; others only in tiles that have some (`PLAIN`).
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

SIZES = (
    *("tokens", "slices", "slice_items", "items", "first_tile", "windows", "map_width"),
    *("heavy", "blocks", "images"),
)
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
    return (number[:, None] == number[None, :]).to(tl.float32).to(dtype)


@triton.jit
def _bias_tile(bias, TILE: tl.constexpr, TILES: tl.constexpr, BLOCK_K: tl.constexpr):
    """One tile of the bias [queries, BLOCK_K], if there is one. Loaded before a loop it stays at hand."""
    if TILE < TILES:
        return tl.load(bias + TILE * BLOCK_K + tl.arange(0, BLOCK_K)[None, :])
    else:
        return 0.0


@triton.jit
def _scores(
    q, bias, base, key, scale, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What `_biased_product` makes of a tile, and its keys and values.

    Args:
        q: [queries, BLOCK_D].
        bias: [queries, keys], as `attention.kernel_bias` prepares it.
        base: this head's queries of the image's first token.
        key: token of every key; -1, where there is none, in tiles that are MASKED.
        scale: brings products to base 2.
    """
    offset = (tl.maximum(key, 0) if MASKED else key) * (3 * WIDTH)
    k = _load_rows(base + WIDTH, offset, HEAD_DIM, BLOCK_D)
    v = _load_rows(base + 2 * WIDTH, offset, HEAD_DIM, BLOCK_D)
    return _biased_product(q, tl.trans(k), bias, scale, PRECISION), k, v


@triton.jit
def _biased_product(a, b, bias, scale, PRECISION: tl.constexpr):
    """Scores of queries and keys in float32, up to the factor that `_unit` gives."""
    if bias.dtype == tl.float32:
        return tl.dot(a, b, input_precision=PRECISION) * (scale / LOG2E) + bias
    else:
        return tl.dot(a, b, acc=tl.dot(bias, _identity(bias.shape[1], bias.dtype)))


@triton.jit
def _unit(scale, dtype: tl.constexpr):
    """What brings the results of `_biased_product` to base 2."""
    return LOG2E if dtype == tl.float32 else scale


@triton.jit
def _weight(score, row, scale, dtype: tl.constexpr):
    """Exponential of scores less one number of their row. One multiplication and addition come before it; in
    float32 the difference comes first, which loses fewer bits."""
    unit = _unit(scale, dtype)
    if dtype == tl.float32:
        return tl.exp2((score - row) * unit)
    else:
        return tl.exp2(score * unit - row * unit)


@triton.jit
def _forward_tile(
    top, total, out, q, bias, base, key_ptr, scale, TILE: tl.constexpr, TILES: tl.constexpr,
    WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, if there is such a tile: maximum and sum [queries] and output [queries,
    BLOCK_D] so far."""
    if TILE < TILES:
        key = tl.load(key_ptr + TILE * BLOCK_K + tl.arange(0, BLOCK_K))
        score, _, v = _scores(q, bias, base, key, scale, WIDTH, HEAD_DIM, BLOCK_D, MASKED, PRECISION)
        if MASKED:
            score = tl.where((key >= 0)[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        weight = _weight(score, new_top[:, None], scale, q.dtype)
        shrink = tl.exp2((top - new_top) * _unit(scale, q.dtype))
        total = total * shrink + tl.sum(weight, 1)
        out = tl.dot(weight.to(v.dtype), v, acc=out * shrink[:, None], input_precision=PRECISION)
        return new_top, total, out
    else:
        return top, total, out


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    qkv_ptr, bias_ptr, index_ptr, first_ptr, out_ptr, lse_ptr,
    tokens, slices, slice_items, items, windows, map_width, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SIDE: tl.constexpr, SHARED: tl.constexpr,
    ROW: tl.constexpr, BLOCK_Q: tl.constexpr, Q_BLOCKS: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, TILES: tl.constexpr, TAIL: tl.constexpr, PLAIN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of a slice of the items of one group, head and block of queries.

    Keys are TILES whole tiles and a TAIL; where they are at most four, the bias stays at hand. The first
    PLAIN tiles have no absent key. Grid, as `_place` takes it apart: groups * slices * Q_BLOCKS * HEADS.
    """
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    QUERIES_PADDED: tl.constexpr = Q_BLOCKS * BLOCK_Q
    RESIDENT: tl.constexpr = TILES if TILES <= 4 else 0
    TAILS: tl.constexpr = 1 if TAIL > 0 else 0
    TAIL_BLOCK: tl.constexpr = TAIL if TAIL > 0 else 16
    head, query_block, place = _place(HEADS, Q_BLOCKS)
    group = place // slices
    first = place % slices * slice_items
    query = query_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    real = query < SIDE * SIDE
    query_token = _query_tokens(query, map_width, SIDE)
    bias = bias_ptr + (head if SHARED else head * windows + group).to(tl.int64) * (QUERIES_PADDED * ROW)
    bias += query[:, None] * ROW
    bias_0 = _bias_tile(bias, 0, RESIDENT, BLOCK_K)
    bias_1 = _bias_tile(bias, 1, RESIDENT, BLOCK_K)
    bias_2 = _bias_tile(bias, 2, RESIDENT, BLOCK_K)
    bias_3 = _bias_tile(bias, 3, RESIDENT, BLOCK_K)
    bias_tail = _bias_tile(bias + TILES * BLOCK_K, 0, TAILS, TAIL_BLOCK)
    image = first // windows if SHARED else first
    window = first % windows if SHARED else group
    for _item in range(first, tl.minimum(first + slice_items, items)):
        base = qkv_ptr + (image.to(tl.int64) * tokens * (3 * WIDTH) + head * HEAD_DIM)
        token = tl.load(first_ptr + window) + query_token
        q = _load_rows(base, token * (3 * WIDTH), HEAD_DIM, BLOCK_D)
        key = index_ptr + window * ROW
        top = tl.full([BLOCK_Q], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        out = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        top, total, out = _forward_tile(
            top, total, out, q, bias_0, base, key, scale, 0, RESIDENT,
            WIDTH, HEAD_DIM, BLOCK_D, BLOCK_K, PLAIN < 1, PRECISION,
        )  # fmt: skip
        top, total, out = _forward_tile(
            top, total, out, q, bias_1, base, key, scale, 1, RESIDENT,
            WIDTH, HEAD_DIM, BLOCK_D, BLOCK_K, PLAIN < 2, PRECISION,
        )  # fmt: skip
        top, total, out = _forward_tile(
            top, total, out, q, bias_2, base, key, scale, 2, RESIDENT,
            WIDTH, HEAD_DIM, BLOCK_D, BLOCK_K, PLAIN < 3, PRECISION,
        )  # fmt: skip
        top, total, out = _forward_tile(
            top, total, out, q, bias_3, base, key, scale, 3, RESIDENT,
            WIDTH, HEAD_DIM, BLOCK_D, BLOCK_K, PLAIN < 4, PRECISION,
        )  # fmt: skip
        if RESIDENT == 0:
            for tile in range(TILES):
                start = tile * BLOCK_K
                top, total, out = _forward_tile(
                    top, total, out, q, _bias_tile(bias + start, 0, 1, BLOCK_K), base, key + start, scale,
                    0, 1, WIDTH, HEAD_DIM, BLOCK_D, BLOCK_K, True, PRECISION,
                )  # fmt: skip
        top, total, out = _forward_tile(
            top, total, out, q, bias_tail, base, key + TILES * BLOCK_K, scale, 0, TAILS,
            WIDTH, HEAD_DIM, BLOCK_D, TAIL_BLOCK, PLAIN < TILES + 1, PRECISION,
        )  # fmt: skip
        total = tl.where(total > 0.0, total, 1.0)
        out_base = out_ptr + (image.to(tl.int64) * windows * (SIDE * SIDE * WIDTH) + head * HEAD_DIM)
        _store_rows(out_base, out / total[:, None], token * WIDTH, real, HEAD_DIM, BLOCK_D)
        row = ((image * HEADS + head).to(tl.int64) * windows + window) * QUERIES_PADDED
        lse = top + tl.log2(total) / _unit(scale, q.dtype)
        tl.store(lse_ptr + row + query, tl.where(real, lse, float("inf")))
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
    dq, d_bias, q, d_out, lse, delta, bias, base, key_ptr, scale, TILE: tl.constexpr, TILES: tl.constexpr,
    WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr, WITH_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and of the bias with one more tile of keys, if there is such a tile."""
    if TILE < TILES:
        key = tl.load(key_ptr + TILE * BLOCK_K + tl.arange(0, BLOCK_K))
        score, k, v = _scores(q, bias, base, key, scale, WIDTH, HEAD_DIM, BLOCK_D, MASKED, PRECISION)
        weight = _weight(score, lse[:, None], scale, q.dtype)
        if MASKED:
            weight = tl.where((key >= 0)[None, :], weight, 0.0)
        d_weight = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
        d_score = (weight * (d_weight - delta[:, None])).to(k.dtype)
        if WITH_BIAS:
            if k.dtype == tl.float32:
                d_bias += d_score
            else:
                d_bias = tl.dot(d_score, _identity(BLOCK_K, k.dtype), acc=d_bias)
        return tl.dot(d_score, k, acc=dq, input_precision=PRECISION), d_bias
    else:
        return dq, d_bias


@triton.jit
def _no_gradient(TILE: tl.constexpr, TILES: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Where the gradient of one tile of the bias is summed, if there is such a tile."""
    if TILE < TILES:
        return tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    else:
        return 0.0


@triton.jit
def _store_tile(pointer, value, TILE: tl.constexpr, TILES: tl.constexpr, BLOCK_K: tl.constexpr):
    """Write one tile of the gradient of the bias, if there is such a tile."""
    if TILE < TILES:
        tl.store(pointer + TILE * BLOCK_K + tl.arange(0, BLOCK_K)[None, :], value)


@triton.jit(do_not_specialize=SIZES)
def query_gradient_kernel(
    qkv_ptr, bias_ptr, index_ptr, first_ptr, out_ptr, d_out_ptr, lse_ptr, delta_ptr, d_qkv_ptr, d_bias_ptr,
    tokens, slices, slice_items, items, first_tile, windows, map_width, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SIDE: tl.constexpr, SHARED: tl.constexpr,
    ROW: tl.constexpr, BLOCK_Q: tl.constexpr, Q_BLOCKS: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, TILES: tl.constexpr, PLAIN: tl.constexpr, WITH_BIAS: tl.constexpr,
    WITH_QUERY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries and bias over a slice of the items of one group, head and block of queries.

    d_bias is [slices, N, groups, queries, keys], padded. WITH_BIAS: at most seven tiles of keys from
    `first_tile` on, whose bias and bias gradient stay at hand. Where there are more keys, a launch with
    WITH_BIAS alone finds the gradient of the bias, part by part, and one without it that of the queries.
    WITH_QUERY also writes `delta`, the sum over channels of output times its gradient.

    Grid, as `_place` takes it apart: groups * slices * Q_BLOCKS * HEADS.
    """
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    QUERIES_PADDED: tl.constexpr = Q_BLOCKS * BLOCK_Q
    STATIC: tl.constexpr = TILES if WITH_BIAS else 0
    head, query_block, place = _place(HEADS, Q_BLOCKS)
    group = place // slices
    part = place % slices
    first = part * slice_items
    first_column = first_tile * BLOCK_K
    query = query_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    real = query < SIDE * SIDE
    query_token = _query_tokens(query, map_width, SIDE)
    bias_offset = (head if SHARED else head * windows + group).to(tl.int64) * (QUERIES_PADDED * ROW)
    bias = bias_ptr + bias_offset + (query[:, None] * ROW + first_column)
    bias_0 = _bias_tile(bias, 0, STATIC, BLOCK_K)
    bias_1 = _bias_tile(bias, 1, STATIC, BLOCK_K)
    bias_2 = _bias_tile(bias, 2, STATIC, BLOCK_K)
    bias_3 = _bias_tile(bias, 3, STATIC, BLOCK_K)
    bias_4 = _bias_tile(bias, 4, STATIC, BLOCK_K)
    bias_5 = _bias_tile(bias, 5, STATIC, BLOCK_K)
    bias_6 = _bias_tile(bias, 6, STATIC, BLOCK_K)
    sum_0 = _no_gradient(0, STATIC, BLOCK_Q, BLOCK_K)
    sum_1 = _no_gradient(1, STATIC, BLOCK_Q, BLOCK_K)
    sum_2 = _no_gradient(2, STATIC, BLOCK_Q, BLOCK_K)
    sum_3 = _no_gradient(3, STATIC, BLOCK_Q, BLOCK_K)
    sum_4 = _no_gradient(4, STATIC, BLOCK_Q, BLOCK_K)
    sum_5 = _no_gradient(5, STATIC, BLOCK_Q, BLOCK_K)
    sum_6 = _no_gradient(6, STATIC, BLOCK_Q, BLOCK_K)
    image = first // windows if SHARED else first
    window = first % windows if SHARED else group
    for _item in range(first, tl.minimum(first + slice_items, items)):
        image_offset = image.to(tl.int64) * tokens * (3 * WIDTH) + head * HEAD_DIM
        out_offset = image.to(tl.int64) * windows * (SIDE * SIDE * WIDTH) + head * HEAD_DIM
        base = qkv_ptr + image_offset
        token = tl.load(first_ptr + window) + query_token
        q = _load_rows(base, token * (3 * WIDTH), HEAD_DIM, BLOCK_D)
        d_out = _load_rows(d_out_ptr + out_offset, token * WIDTH, HEAD_DIM, BLOCK_D)
        row = ((image * HEADS + head).to(tl.int64) * windows + window) * QUERIES_PADDED
        lse = tl.load(lse_ptr + row + query)
        if WITH_QUERY:
            out = _load_rows(out_ptr + out_offset, token * WIDTH, HEAD_DIM, BLOCK_D)
            delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
        else:
            delta = tl.load(delta_ptr + row + query)
        key = index_ptr + (window * ROW + first_column)
        dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        dq, sum_0 = _gradient_tile(
            dq, sum_0, q, d_out, lse, delta, bias_0, base, key, scale, 0, STATIC,
            WIDTH, HEAD_DIM, BLOCK_D, BLOCK_K, PLAIN < 1, WITH_BIAS, PRECISION,
        )  # fmt: skip
        dq, sum_1 = _gradient_tile(
            dq, sum_1, q, d_out, lse, delta, bias_1, base, key, scale, 1, STATIC,
            WIDTH, HEAD_DIM, BLOCK_D, BLOCK_K, PLAIN < 2, WITH_BIAS, PRECISION,
        )  # fmt: skip
        dq, sum_2 = _gradient_tile(
            dq, sum_2, q, d_out, lse, delta, bias_2, base, key, scale, 2, STATIC,
            WIDTH, HEAD_DIM, BLOCK_D, BLOCK_K, PLAIN < 3, WITH_BIAS, PRECISION,
        )  # fmt: skip
        dq, sum_3 = _gradient_tile(
            dq, sum_3, q, d_out, lse, delta, bias_3, base, key, scale, 3, STATIC,
            WIDTH, HEAD_DIM, BLOCK_D, BLOCK_K, PLAIN < 4, WITH_BIAS, PRECISION,
        )  # fmt: skip
        dq, sum_4 = _gradient_tile(
            dq, sum_4, q, d_out, lse, delta, bias_4, base, key, scale, 4, STATIC,
            WIDTH, HEAD_DIM, BLOCK_D, BLOCK_K, PLAIN < 5, WITH_BIAS, PRECISION,
        )  # fmt: skip
        dq, sum_5 = _gradient_tile(
            dq, sum_5, q, d_out, lse, delta, bias_5, base, key, scale, 5, STATIC,
            WIDTH, HEAD_DIM, BLOCK_D, BLOCK_K, PLAIN < 6, WITH_BIAS, PRECISION,
        )  # fmt: skip
        dq, sum_6 = _gradient_tile(
            dq, sum_6, q, d_out, lse, delta, bias_6, base, key, scale, 6, STATIC,
            WIDTH, HEAD_DIM, BLOCK_D, BLOCK_K, PLAIN < 7, WITH_BIAS, PRECISION,
        )  # fmt: skip
        if STATIC == 0:
            for tile in range(TILES):
                start = tile * BLOCK_K
                dq, _ = _gradient_tile(
                    dq, 0.0, q, d_out, lse, delta, _bias_tile(bias + start, 0, 1, BLOCK_K), base,
                    key + start, scale, 0, 1, WIDTH, HEAD_DIM, BLOCK_D, BLOCK_K, True, False, PRECISION,
                )  # fmt: skip
        if WITH_QUERY:
            dq_base = d_qkv_ptr + image_offset
            _store_rows(dq_base, dq * (scale / LOG2E), token * (3 * WIDTH), real, HEAD_DIM, BLOCK_D)
            tl.store(delta_ptr + row + query, delta)
        image, window = _next_item(image, window, windows, SHARED)
    d_bias = d_bias_ptr + part.to(tl.int64) * (
        (HEADS if SHARED else HEADS * windows) * (QUERIES_PADDED * ROW)
    )
    d_bias += bias_offset + (query[:, None] * ROW + first_column)
    _store_tile(d_bias, sum_0, 0, STATIC, BLOCK_K)
    _store_tile(d_bias, sum_1, 1, STATIC, BLOCK_K)
    _store_tile(d_bias, sum_2, 2, STATIC, BLOCK_K)
    _store_tile(d_bias, sum_3, 3, STATIC, BLOCK_K)
    _store_tile(d_bias, sum_4, 4, STATIC, BLOCK_K)
    _store_tile(d_bias, sum_5, 5, STATIC, BLOCK_K)
    _store_tile(d_bias, sum_6, 6, STATIC, BLOCK_K)


@triton.jit(do_not_specialize=SIZES)
def key_gradient_kernel(
    qkv_ptr, bias_ptr, d_out_ptr, lse_ptr, delta_ptr, d_qkv_ptr,
    block_token_ptr, entry_start_ptr, entry_window_ptr, entry_first_ptr, entry_column_ptr,
    tokens, heavy, blocks, images, windows, map_width, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SIDE: tl.constexpr, SHARED: tl.constexpr,
    ROW: tl.constexpr, BLOCK_Q: tl.constexpr, Q_BLOCKS: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys and values of one block of tokens, image and head.

    bias is [N, groups, keys, queries], padded: the keys of a block are whole rows of it, and tokens that a
    window does not see have a row that no weight survives. Grid: blocks * images * HEADS; the heavy blocks of
    all images first, as they take longest; then image by image, so that windows are read while they are in
    the cache.
    """
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    QUERIES_PADDED: tl.constexpr = Q_BLOCKS * BLOCK_Q
    TOGETHER: tl.constexpr = 2 if Q_BLOCKS % 2 == 0 and BLOCK_Q == 32 else 1  # blocks of queries in a step
    head, _, place = _place(HEADS, 1)
    late = place - heavy * images
    light = tl.maximum(blocks - heavy, 1)
    block = tl.where(late < 0, place // images, heavy + late % light)
    image = tl.where(late < 0, place % images, late // light)
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
    start = tl.load(entry_start_ptr + block) * (Q_BLOCKS // TOGETHER)
    stop = tl.load(entry_start_ptr + block + 1) * (Q_BLOCKS // TOGETHER)
    for step in range(start, stop):
        entry = step // (Q_BLOCKS // TOGETHER)
        first_query = step % (Q_BLOCKS // TOGETHER) * (TOGETHER * BLOCK_Q)
        window = tl.load(entry_window_ptr + entry)
        first = tl.load(entry_first_ptr + entry)
        bias_row = bias_base if SHARED else bias_base + window.to(tl.int64) * (QUERIES_PADDED * ROW)
        column = tl.load(entry_column_ptr + entry * BLOCK_K + slot)
        row = row_base + window * QUERIES_PADDED
        for part in tl.static_range(TOGETHER):
            query = first_query + part * BLOCK_Q + tl.arange(0, BLOCK_Q)
            query_token = first + _query_tokens(query, map_width, SIDE)
            q = _load_rows(base, query_token * (3 * WIDTH), HEAD_DIM, BLOCK_D)
            d_out = _load_rows(d_out_base, query_token * WIDTH, HEAD_DIM, BLOCK_D)
            lse = tl.load(lse_ptr + row + query)
            delta = tl.load(delta_ptr + row + query)
            bias = tl.load(bias_row + (column[:, None] * QUERIES_PADDED + query[None, :]))
            score = _biased_product(k, tl.trans(q), bias, scale, PRECISION)
            weight = _weight(score, lse[None, :], scale, k.dtype)
            dv = tl.dot(weight.to(d_out.dtype), d_out, acc=dv, input_precision=PRECISION)
            d_weight = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
            d_score = weight * (d_weight - delta[None, :])
            dk = tl.dot(d_score.to(q.dtype), q, acc=dk, input_precision=PRECISION)
    d_base = d_qkv_ptr + image_offset
    _store_rows(d_base + WIDTH, dk * (scale / LOG2E), offset, token >= 0, HEAD_DIM, BLOCK_D)
    _store_rows(d_base + 2 * WIDTH, dv, offset, token >= 0, HEAD_DIM, BLOCK_D)


INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)
"""TRITON_INTERPRET was set when this module was imported: the kernels run on CPU tensors, slowly."""
