"""The kernels of `triton_norm`: what one program computes, in Triton's language.

A tile is `ROWS` tokens with all their channels, so that LayerNorm's sums stay within it. With one warp for
128 channels (`triton_norm._compile_time`) a thread has four channels of every token of a tile, and adds up by
itself what becomes the gradient of a weight.

Offsets within an image are 32-bit numbers, kept apart from 64-bit base pointers, as in `triton_passes`.

Legend: as `triton_norm`.
"""

from __future__ import annotations

import triton
import triton.language as tl

SIZES = (
    *("height", "width", "tokens", "windows", "windows_across", "items", "slice_items"),
    *("rows", "image_rows", "tiles", "slice_tiles"),
)
"""Arguments whose value, such as 1 or a multiple of 16, makes no kernel of its own."""


@triton.jit
def _channels(BLOCK_C: tl.constexpr):
    """All channels, of which a thread takes four at once, whatever their dtype. By itself the compiler gives
    it eight of 16 bits, and moves such tiles through shared memory to meet those of 32 bits."""
    return tl.max_contiguous(tl.arange(0, BLOCK_C), 4)


@triton.jit
def _load_channels(base, channel, CHANNELS: tl.constexpr):
    """One number per channel, float32, 0 beyond the last: [BLOCK_C]."""
    return tl.load(base + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)


@triton.jit
def _load_tile(base, row, real, channel, CHANNELS: tl.constexpr):
    """All channels of some rows, float32: [ROWS, BLOCK_C], 0 for those that are not real."""
    mask = real[:, None] & (channel < CHANNELS)[None, :]
    offset = row[:, None] * CHANNELS + channel[None, :]
    return tl.load(base + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_tile(base, value, row, real, channel, CHANNELS: tl.constexpr):
    """Write what `_load_tile` reads."""
    mask = real[:, None] & (channel < CHANNELS)[None, :]
    offset = row[:, None] * CHANNELS + channel[None, :]
    tl.store(base + offset, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _normalised(x, channel, CHANNELS: tl.constexpr, EPS: tl.constexpr):
    """Rows with mean 0 and variance 1, their means, and what they were multiplied with."""
    mean = tl.sum(x, 1) / CHANNELS
    centred = tl.where((channel < CHANNELS)[None, :], x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / CHANNELS + EPS)
    return centred * rstd[:, None], mean, rstd


@triton.jit
def _norm_gradient(d_out, normal, rstd, weight, CHANNELS: tl.constexpr):
    """Gradient of LayerNorm's input. `normal` is the input with mean 0 and variance 1."""
    slope = d_out * weight[None, :]
    along = tl.sum(slope * normal, 1) / CHANNELS
    common = tl.sum(slope, 1) / CHANNELS
    return (slope - common[:, None] - normal * along[:, None]) * rstd[:, None]


@triton.jit
def _store_partial(base, d_weight, d_bias, channel, CHANNELS: tl.constexpr):
    """Write this program's share of the gradients of LayerNorm's weight and bias, of [programs, 2, C]."""
    mask = channel < CHANNELS
    base += tl.program_id(0) * (2 * CHANNELS)
    tl.store(base + channel, d_weight, mask=mask)
    tl.store(base + CHANNELS + channel, d_bias, mask=mask)


@triton.jit
def _place_in_map(window, windows_across, place, height, width, SIDE: tl.constexpr):
    """Row and column of tokens of a window, whether the window has them, and whether the map does."""
    row = window // windows_across * SIDE + place // SIDE
    column = window % windows_across * SIDE + place % SIDE
    inside = place < SIDE * SIDE
    return row, column, inside, inside & (row < height) & (column < width)


@triton.jit(do_not_specialize=SIZES)
def norm_tokens_kernel(
    x_ptr, weight_ptr, bias_ptr, pool_weight_ptr, pool_bias_ptr, tokens_ptr, mean_ptr, rstd_ptr,
    height, width, tokens, windows, windows_across,
    SIDE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr, WITH_POOL: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Tokens of one window of one image, and the pooled one. Grid: images * windows."""
    image = (tl.program_id(0) // windows).to(tl.int64)
    window = tl.program_id(0) % windows
    fine = windows * (SIDE * SIDE)
    channel = _channels(BLOCK_C)
    weight = _load_channels(weight_ptr, channel, CHANNELS)
    bias = _load_channels(bias_ptr, channel, CHANNELS)
    x_base = x_ptr + image * (height * width * CHANNELS)
    tokens_base = tokens_ptr + image * (tokens * CHANNELS)
    first_statistic = image * (height * width)
    pooled = tl.zeros([BLOCK_C], tl.float32)
    for tile in range((SIDE * SIDE + ROWS - 1) // ROWS):
        place = tile * ROWS + tl.arange(0, ROWS)
        row, column, inside, real = _place_in_map(window, windows_across, place, height, width, SIDE)
        token = row * width + column
        x = _load_tile(x_base, token, real, channel, CHANNELS)
        normal, mean, rstd = _normalised(x, channel, CHANNELS, EPS)
        out = tl.where(real[:, None], normal * weight[None, :] + bias[None, :], 0.0)
        padded_token = row * (windows_across * SIDE) + column
        _store_tile(tokens_base, out, padded_token, inside, channel, CHANNELS)
        tl.store(mean_ptr + first_statistic + token, mean, mask=real)
        tl.store(rstd_ptr + first_statistic + token, rstd, mask=real)
        if WITH_POOL:
            share = tl.load(pool_weight_ptr + place, mask=inside, other=0.0).to(tl.float32)
            pooled += tl.sum(out * share[:, None], 0)
    if WITH_POOL:
        pooled += tl.load(pool_bias_ptr).to(tl.float32)
        pooled_base = tokens_base + (fine + window) * CHANNELS
        tl.store(pooled_base + channel, pooled.to(tokens_ptr.dtype.element_ty), mask=channel < CHANNELS)


@triton.jit(do_not_specialize=SIZES)
def norm_tokens_gradient_kernel(
    d_tokens_ptr, d_map_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, pool_weight_ptr,
    dx_ptr, d_norm_ptr, d_pool_ptr,
    height, width, tokens, windows, windows_across, items, slice_items,
    SIDE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr, WITH_MAP: tl.constexpr, WITH_POOL: tl.constexpr, WITH_PARAMETERS: tl.constexpr,
):  # fmt: skip
    """Gradients of the map, and a share of those of the parameters, for a slice of all images' windows.

    Of every window the first tile is worked on, then of every window the second, and so on: so the gradients
    of the pooling weights of a tile's places stay in registers. Grid: slices.
    """
    first = tl.program_id(0) * slice_items
    count = tl.minimum(slice_items, items - first)
    fine = windows * (SIDE * SIDE)
    channel = _channels(BLOCK_C)
    weight = _load_channels(weight_ptr, channel, CHANNELS)
    bias = _load_channels(bias_ptr, channel, CHANNELS)
    d_weight = tl.zeros([BLOCK_C], tl.float32)
    d_bias = tl.zeros([BLOCK_C], tl.float32)
    for tile in range((SIDE * SIDE + ROWS - 1) // ROWS):
        place = tile * ROWS + tl.arange(0, ROWS)
        if WITH_POOL:
            share = tl.load(pool_weight_ptr + place, mask=place < SIDE * SIDE, other=0.0).to(tl.float32)
        d_share = tl.zeros([ROWS], tl.float32)
        for step in range(0, count):
            image = ((first + step) // windows).to(tl.int64)
            window = (first + step) % windows
            row, column, inside, real = _place_in_map(window, windows_across, place, height, width, SIDE)
            token = row * width + column
            padded_token = row * (windows_across * SIDE) + column
            d_base = d_tokens_ptr + image * (tokens * CHANNELS)
            first_token = image * (height * width)
            x = _load_tile(x_ptr + first_token * CHANNELS, token, real, channel, CHANNELS)
            d_out = _load_tile(d_base, padded_token, real, channel, CHANNELS)
            mean = tl.load(mean_ptr + first_token + token, mask=real, other=0.0)
            rstd = tl.load(rstd_ptr + first_token + token, mask=real, other=0.0)
            normal = (x - mean[:, None]) * rstd[:, None]
            if WITH_POOL:
                d_pooled = _load_channels(d_base + (fine + window) * CHANNELS, channel, CHANNELS)
                if WITH_PARAMETERS:
                    out = normal * weight[None, :] + bias[None, :]
                    d_share += tl.where(real, tl.sum(out * d_pooled[None, :], 1), 0.0)
                d_out += tl.where(real, share, 0.0)[:, None] * d_pooled[None, :]
            if WITH_PARAMETERS:
                d_weight += tl.sum(d_out * normal, 0)
                d_bias += tl.sum(d_out, 0)
            dx = _norm_gradient(d_out, normal, rstd, weight, CHANNELS)
            if WITH_MAP:
                d_map_base = d_map_ptr + first_token * CHANNELS
                dx += _load_tile(d_map_base, token, real, channel, CHANNELS)
            _store_tile(dx_ptr + first_token * CHANNELS, dx, token, real, channel, CHANNELS)
        if WITH_POOL and WITH_PARAMETERS:
            d_pool_base = d_pool_ptr + tl.program_id(0) * (SIDE * SIDE)
            tl.store(d_pool_base + place, d_share, mask=place < SIDE * SIDE)
    if WITH_PARAMETERS:
        _store_partial(d_norm_ptr, d_weight, d_bias, channel, CHANNELS)


@triton.jit(do_not_specialize=SIZES)
def add_norm_kernel(
    x_ptr, branch_ptr, factor_ptr, weight_ptr, bias_ptr, sum_ptr, out_ptr, mean_ptr, rstd_ptr,
    rows, image_rows, tiles, slice_tiles,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, WITH_FACTOR: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    """Sum and its LayerNorm for a slice of the tiles. Grid: slices."""
    first = tl.program_id(0) * slice_tiles
    channel = _channels(BLOCK_C)
    here = tl.arange(0, ROWS)
    weight = _load_channels(weight_ptr, channel, CHANNELS)
    bias = _load_channels(bias_ptr, channel, CHANNELS)
    for step in range(0, tl.minimum(slice_tiles, tiles - first)):
        row = (first + step) * ROWS + here
        real = row < rows
        start = (first + step).to(tl.int64) * (ROWS * CHANNELS)
        branch = _load_tile(branch_ptr + start, here, real, channel, CHANNELS)
        if WITH_FACTOR:
            branch *= tl.load(factor_ptr + row // image_rows, mask=real, other=0.0).to(tl.float32)[:, None]
        x = _load_tile(x_ptr + start, here, real, channel, CHANNELS)
        total = (x + branch).to(sum_ptr.dtype.element_ty)
        _store_tile(sum_ptr + start, total, here, real, channel, CHANNELS)
        normal, mean, rstd = _normalised(total.to(tl.float32), channel, CHANNELS, EPS)
        out = normal * weight[None, :] + bias[None, :]
        _store_tile(out_ptr + start, out, here, real, channel, CHANNELS)
        tl.store(mean_ptr + row, mean, mask=real)
        tl.store(rstd_ptr + row, rstd, mask=real)


@triton.jit(do_not_specialize=SIZES)
def add_norm_gradient_kernel(
    d_sum_ptr, d_out_ptr, sum_ptr, mean_ptr, rstd_ptr, factor_ptr, weight_ptr,
    dx_ptr, d_branch_ptr, d_norm_ptr,
    rows, image_rows, tiles, slice_tiles,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, WITH_FACTOR: tl.constexpr,
    WITH_BRANCH: tl.constexpr, WITH_PARAMETERS: tl.constexpr,
):  # fmt: skip
    """Gradients of `add_norm_kernel` for a slice of the tiles, and a share of those of the parameters.

    Without WITH_BRANCH the branch's gradient is that of the map. Grid: slices.
    """
    first = tl.program_id(0) * slice_tiles
    channel = _channels(BLOCK_C)
    here = tl.arange(0, ROWS)
    weight = _load_channels(weight_ptr, channel, CHANNELS)
    d_weight = tl.zeros([BLOCK_C], tl.float32)
    d_bias = tl.zeros([BLOCK_C], tl.float32)
    for step in range(0, tl.minimum(slice_tiles, tiles - first)):
        row = (first + step) * ROWS + here
        real = row < rows
        start = (first + step).to(tl.int64) * (ROWS * CHANNELS)
        total = _load_tile(sum_ptr + start, here, real, channel, CHANNELS)
        d_out = _load_tile(d_out_ptr + start, here, real, channel, CHANNELS)
        mean = tl.load(mean_ptr + row, mask=real, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=real, other=0.0)
        normal = (total - mean[:, None]) * rstd[:, None]
        if WITH_PARAMETERS:
            d_weight += tl.sum(d_out * normal, 0)
            d_bias += tl.sum(d_out, 0)
        dx = _norm_gradient(d_out, normal, rstd, weight, CHANNELS)
        dx += _load_tile(d_sum_ptr + start, here, real, channel, CHANNELS)
        _store_tile(dx_ptr + start, dx, here, real, channel, CHANNELS)
        if WITH_BRANCH:
            if WITH_FACTOR:
                factor = tl.load(factor_ptr + row // image_rows, mask=real, other=0.0).to(tl.float32)
                dx *= factor[:, None]
            _store_tile(d_branch_ptr + start, dx, here, real, channel, CHANNELS)
    if WITH_PARAMETERS:
        _store_partial(d_norm_ptr, d_weight, d_bias, channel, CHANNELS)
