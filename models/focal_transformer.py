"""Focal Transformer (Yang et al., NeurIPS 2021, arXiv 2107.00641): the whole network, in one file.

Needs only torch, timm and numpy. Works alone, with the plain attention operator; ops/ adds faster ones.

Focal attention (section 3.2, equation 3): every token attends finely to its surroundings and coarsely to the
rest. The map is cut into windows of s x s tokens. All queries of a window share one list of keys:

    own window   its s x s tokens
    ring         the window shifted by e tokens towards each of its four corners, minus the window itself; a
                 token in two shifted windows counts twice; at the border of the map the ring wraps around
    level k      k = 0, 1, ...: coarse tokens, 4^k for each window: each is pooled from p x p fine ones,
                 p = s // 2^k. The window sees a square of f + 2^k - 1 of them a side, centred on it; those
                 outside the map are masked

    out = softmax(scale * q k^T + bias) v,      one softmax over all keys of the window

One linear layer makes q, k and v of fine and coarse tokens. The bias is learned per head, and all windows
share it: own window and levels by relative position, the ring by query and slot. Focal-fast (only in the
released code) attends to the fine and coarse tokens nearest to the window's centre instead, and an MLP
computes the bias from the offset, query minus key.

Differences from the original: any input size; contradictory options are refused; masks are -inf, not -100.

Legend: B batch, H W rows and columns of a map, T = H*W fine tokens (inside attention including the padding to
whole windows), S = T + coarse tokens, C channels, N heads, D = C/N, s window side, e expand size, f focal
window, P windows, Q = s*s queries of a window, K its keys; of Focal-fast's bias R offsets and U values of
centre minus key. Maps are [B, H, W, C], positions (row, column);
everything is numbered row by row.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from ctypes import string_at
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from numbers import Integral
from operator import index as integer
from threading import Lock
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from timm.layers import DropPath, Mlp, SelectAdaptivePool2d, to_2tuple, trunc_normal_
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

logger = logging.getLogger(__name__)

CACHED_INDEXES = 64  # per process; a model needs one for each stage, kind of block and input size

# --- Which keys a window sees: integers that follow from the size of the map --------------------------------


@dataclass(frozen=True, eq=False)
class AttentionIndex:
    """The keys of every window of one map size, on one device."""

    height: int  # of the padded map
    width: int
    window: int  # s
    tokens: int  # S
    keys: Tensor  # int64 [P, K]: token of each key; masked keys hold the window's first token
    visible: Tensor | None  # bool [P, 1 or Q, K]: False for masked keys; None if all are visible
    # Read by the layer's `bias`. Focal: rows of the bias tables, for the own window and each level (the ring
    # needs none). Focal-fast: `offset_tables`.
    bias_index: tuple[Tensor, ...]
    bias_by_window: bool = False  # every window has a bias of its own
    backend: str = "plain"  # name of the operator that this is for
    fallback_reason: str = ""  # if `auto` took the plain one: why the others cannot run
    tables: Any = None  # what that operator derived from the above


class Keys(NamedTuple):
    """The keys of every window of one map size, in numpy; fields as in `AttentionIndex`."""

    sizes: tuple[int, int, int, int]  # height, width, window, tokens
    keys: np.ndarray
    visible: np.ndarray | None
    bias_index: Sequence[np.ndarray]
    bias_by_window: bool


class Request(NamedTuple):
    """What an attention operator is wanted for."""

    backend: str  # auto, or a key of BACKENDS
    device: torch.device
    dtype: torch.dtype
    heads: int  # N
    head_dim: int  # D
    trains: bool  # whether a backward pass may follow


def grid(height: int, width: int) -> np.ndarray:
    """Row and column of every cell: [height * width, 2]."""
    return np.stack(np.divmod(np.arange(height * width), width), axis=-1)


def padded_size(height: int, width: int, window: int) -> tuple[int, int]:
    """Rows and columns of a map padded to whole windows."""
    return -(-height // window) * window, -(-width // window) * window


def ring_offsets(window: int, expand: int) -> np.ndarray:
    """Position of every ring slot relative to the window's first token: [slots, 2].

    Four copies of the window, moved by `expand` towards each corner, without what falls into the window.
    """
    corners = np.array([(1, 1), (1, -1), (-1, 1), (-1, -1)]) * expand
    moved = (grid(window, window) + corners[:, None]).reshape(-1, 2)
    return moved[((moved < 0) | (moved >= window)).any(axis=1)]


def relative_index(window: int, region: int) -> np.ndarray:
    """Row of the bias table for each cell of a square and query of a window: [region * region, Q]. Cells and
    tokens are counted alike, as in the original."""
    offset = grid(window, window)[None] - grid(region, region)[:, None] + region - 1
    return offset[..., 0] * (window + region - 1) + offset[..., 1]


def shift_mask(height: int, width: int, window: int, shift: int) -> np.ndarray:
    """Which tokens of a window each of its queries may see on a rolled map, as in Swin: bool [P, Q, Q]."""
    y, x = (np.digitize(np.arange(side), (side - window, side - shift)) for side in (height, width))
    label = y[:, None] * 3 + x  # of 3 x 3 regions
    label = label.reshape(height // window, window, width // window, window).swapaxes(1, 2)
    label = label.reshape(-1, window * window)
    return label[:, :, None] == label[:, None, :]


def nearest_cells(rows: np.ndarray, columns: np.ndarray, height: int, width: int, count: int) -> np.ndarray:
    """The `count` nearest cells of a map for each centre, nearest first, ties row by row.

    Centres are all pairs of `rows` and `columns`, an array each; they may lie outside the map, which has at
    least `count` cells. Centres at the same distances from the four borders form a class, as do those for
    which borders are too far to matter: each class is computed once. Returns int64 [centres, count].
    """
    radius = 2 * int(np.ceil(np.sqrt(count / np.pi))) + 1  # a quarter of such a disc holds `count` cells
    while True:
        offset = grid(2 * radius + 1, 2 * radius + 1) - radius
        distance = (offset**2).sum(axis=1)
        disc = offset[np.argsort(distance, kind="stable")]
        disc = disc[: np.count_nonzero(distance <= radius**2)]
        in_rows, row_class = _inside(rows, height, disc[:, 0], radius)
        in_columns, column_class = _inside(columns, width, disc[:, 1], radius)
        inside = in_rows[:, None] & in_columns  # bool [row classes, column classes, offsets]
        rank = inside.cumsum(axis=-1, dtype=np.int32)
        if rank[..., -1].min() >= count:
            break
        radius += radius // 2
    chosen = np.flatnonzero(inside & (rank <= count)).reshape(*inside.shape[:2], count) % len(disc)
    step = (disc @ (width, 1))[chosen]  # cell - centre, [row classes, column classes, count]
    centre = rows[:, None] * width + columns
    return (centre[..., None] + step[row_class[:, None], column_class]).reshape(-1, count)


def _inside(places: np.ndarray, side: int, offset: np.ndarray, radius: int) -> tuple[np.ndarray, np.ndarray]:
    """Which offsets from rows (or columns) stay in the map, bool [classes, offsets]; class of each row."""
    to_border = np.stack([np.minimum(places, radius), np.minimum(side - 1 - places, radius)], axis=1)
    classes, class_of = np.unique(to_border, axis=0, return_inverse=True)
    return (offset >= -classes[:, :1]) & (offset <= classes[:, 1:]), class_of.reshape(-1)


def focal_keys(
    height: int, width: int, window: int, expand: int, focal_window: int, pooled_levels: int, shift: int
) -> Keys:
    """Keys of Focal attention on a padded map: own window, ring, pooled levels."""
    rows, columns = np.arange(height // window)[:, None], np.arange(width // window)[:, None]
    dy, dx = np.concatenate([grid(window, window), ring_offsets(window, expand)]).T
    y, x = (rows * window + dy) % height, (columns * window + dx) % width
    keys = [y[:, None] * width + x]
    masks = [np.ones(keys[0].shape, dtype=bool)]
    bias_index, tokens = [relative_index(window, window)], height * width
    for level in range(pooled_levels):
        scale, region = 2**level, focal_window + 2**level - 1
        dy, dx = (grid(region, region) - focal_window // 2).T
        y, x = rows * scale + dy, columns * scale + dx
        inside = ((y >= 0) & (y < len(rows) * scale))[:, None] & (x >= 0) & (x < len(columns) * scale)
        keys.append(np.where(inside, tokens + y[:, None] * (len(columns) * scale) + x, keys[0][..., :1]))
        masks.append(inside)
        bias_index.append(relative_index(window, region))
        tokens += len(rows) * len(columns) * scale**2
    visible = np.concatenate(masks, axis=-1).reshape(len(rows) * len(columns), 1, -1)
    if shift:
        visible = np.repeat(visible, window**2, axis=1)
        visible[..., : window**2] = shift_mask(height, width, window, shift)
    all_keys = np.concatenate(keys, axis=-1).reshape(len(visible), -1)
    return Keys((height, width, window, tokens), all_keys, visible, bias_index, False)


def focal_fast_keys(
    height: int, width: int, window: int, topk: int, pooled_levels: int, stored: tuple[bytes, ...] | None
) -> Keys:
    """Keys of Focal-fast attention on an unpadded map: the nearest tokens of each level, or
    `stored` ones, as bytes, which a cache can compare."""
    padded = padded_size(height, width, window)
    windows = grid(padded[0] // window, padded[1] // window)
    if stored is None:
        levels = nearest_keys(height, width, window, topk, pooled_levels)
    else:
        levels = [np.frombuffer(level, dtype=np.int64).reshape(len(windows), -1) for level in stored]
    rows, columns = np.divmod(levels[0], width)
    tokens = padded[0] * padded[1]
    keys = [rows * padded[1] + columns]
    y, x = (windows * window + window // 2).T[..., None]  # centre of each window, [P, 1] each
    to_centre = [(y - rows, x - columns, 1)]
    if pooled_levels:
        keys.append(tokens + levels[1])
        tokens += len(windows)
        y, x = (windows[:, None] - windows[levels[1]]).transpose(2, 0, 1)
        to_centre.append((y, x, window))
    bias_index = offset_tables(to_centre, window)
    return Keys((*padded, window, tokens), np.concatenate(keys, axis=1), None, bias_index, True)


def nearest_keys(height: int, width: int, window: int, topk: int, pooled_levels: int) -> list[np.ndarray]:
    """For every window the nearest fine tokens [P, K_0], numbered on the unpadded map; with a pooled level
    also the nearest windows [P, K_1]."""
    rows, columns = (np.arange(side // window) for side in padded_size(height, width, window))
    centres = (rows * window + window // 2, columns * window + window // 2)
    choice = [nearest_cells(*centres, height, width, min(topk, height * width))]
    if pooled_levels:
        count = min(topk, len(rows) * len(columns))
        choice.append(nearest_cells(rows, columns, len(rows), len(columns), count))
    return choice


def whole_numbers(x: Tensor) -> Tensor:
    """Stored keys as integers, if averaging or another type of weights made plain floats of them."""
    is_plain = x.layout == torch.strided and not x.is_nested
    return x.detach().float().round().long() if is_plain and x.is_floating_point() else x


def as_near(cells: np.ndarray, nearest: np.ndarray, centres: np.ndarray, height: int, width: int) -> bool:
    """Whether cells of a map are distinct and at the same distances from `centres`, [P, 2], as the `nearest`
    ones; both [P, K]."""

    def distances(numbers: np.ndarray) -> np.ndarray:
        offset = np.stack(np.divmod(numbers, width), axis=-1) - centres[:, None]
        return np.sort((offset**2).sum(axis=-1), axis=1)

    if cells.min() < 0 or cells.max() >= height * width:
        return False
    is_distinct = (np.diff(np.sort(cells, axis=1), axis=1) > 0).all()
    return bool(is_distinct) and np.array_equal(distances(cells), distances(nearest))


def offset_tables(
    to_centre: Sequence[tuple[np.ndarray, np.ndarray, int]], window: int
) -> tuple[np.ndarray, ...]:
    """Tables with which the bias is computed once for each distinct offset, query minus key, then gathered.

    Args:
        to_centre: for each level rows and columns of the window's centre minus key, [P, K_level] each, and
            their unit in tokens.

    Returns:
        offsets: for each level every offset in the bounding box of all query minus key, float32 [R_level, 2].
        rows: number of the offset, those of all levels counted, for each value of centre minus key and each
            query, [U, Q]. All U values in the bounding box of each level are there.
        step: number of each key's value of centre minus key, [K, P].
    """
    offsets, rows, steps, first_row, first_step = [], [], [], 0, 0
    for y, x, unit in to_centre:
        low, size = np.array([y.min(), x.min()]), np.array([np.ptp(y), np.ptp(x)]) + 1
        box = (size - 1) * unit + window
        offsets.append((grid(*box) + low * unit - window // 2).astype(np.float32))
        place = grid(*size)[:, None] * unit + grid(window, window)
        rows.append(place @ (box[1], 1) + first_row)
        steps.append((y - low[0]) * size[1] + x - low[1] + first_step)
        first_row, first_step = first_row + len(offsets[-1]), first_step + len(place)
    step = np.concatenate(steps, axis=1).T
    return *offsets, np.concatenate(rows), np.ascontiguousarray(step)


@torch.inference_mode(False)  # inference tensors could not be used in training
def make_index(keys_of: Callable[..., Keys], arguments: tuple[Any, ...], request: Request) -> AttentionIndex:
    """The keys on the device, with the operator that serves a request."""
    device = request.device
    sizes, keys, visible, bias_index, by_window = keys_of(*arguments)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"the first map of {sizes[0]} x {sizes[1]} tokens came while a CUDA graph was captured: run the "
            "model once on such images, with gradients if the graph has some, and capture it then"
        )
    seen = None if visible is None or visible.all() else torch.tensor(visible, device=device)
    on_device, *rows = (torch.tensor(array, device=device) for array in (keys, *bias_index))
    index = AttentionIndex(*sizes, on_device, seen, tuple(rows), by_window)
    index = choose_backend(index, request)
    mark_static(index)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # other streams may use it next
    return index


def mark_static(part: Any) -> None:
    """Tell torch.compile that no side of an index's tensors changes with a batch size that it equals now.

    `torch._dynamo.mark_static` sets the same attribute, but does nothing while a model is compiled.
    """
    if isinstance(part, Tensor):
        part._dynamo_static_indices = {*range(part.ndim)}  # type: ignore[attr-defined]
    elif is_dataclass(part):
        mark_static([getattr(part, field.name) for field in fields(part)])
    elif isinstance(part, tuple | list):
        for each in part:
            mark_static(each)


cached_index = lru_cache(maxsize=CACHED_INDEXES)(make_index)
IN_CUDA_GRAPHS: set[AttentionIndex] = set()  # which a graph reads whenever it is replayed, so they stay


@torch.compiler.assume_constant_result
def get_index(
    traced: bool, keys_of: Callable[..., Keys], arguments: tuple[Any, ...], request: tuple[Any, ...]
) -> AttentionIndex:
    """As `make_index`, from a cache unless `traced`: tensors made while tracing belong to the trace.

    torch.compile sees a constant, and accepts only constants as arguments: `request` is a plain tuple.
    """
    index = (make_index if traced else cached_index)(keys_of, arguments, Request(*request))
    if index.keys.is_cuda and torch.cuda.is_current_stream_capturing():
        IN_CUDA_GRAPHS.add(index)
    return index


# --- The operator that computes attention -------------------------------------------------------------------


def plain_attention(
    qkv: Tensor, index: AttentionIndex, bias: Tensor, scale: float, fused: bool = True
) -> Tensor:
    """Attention of every window's queries to its keys, in PyTorch's own operations: [B, T, C].

    Args:
        qkv: [B, S, 3, N, D]; the T fine tokens come first, and the queries of the others are not used.
        index: which keys each window sees.
        bias: added to the scores, [N, P or 1, Q, K].
        scale: factor of the scores.
        fused: whether PyTorch's fused kernels may run. They have no second derivative.
    """
    batch = -1  # in every reshape: a number would be fixed in ONNX files of TorchScript
    heads, dim, keys = (integer(n) for n in (*qkv.shape[3:], bias.shape[-1]))
    s, windows = index.window, len(index.keys)
    rows, columns = index.height // s, index.width // s
    q, k, v = qkv.transpose(1, 3).unbind(2)  # [B, N, S, D]
    q = q[:, :, : index.height * index.width].reshape(batch, heads, rows, s, columns, s, dim)
    q = q.transpose(3, 4).reshape(batch, heads * windows, s * s, dim)
    every_key = index.keys.flatten()
    k, v = (x.index_select(2, every_key).reshape(batch, heads * windows, keys, dim) for x in (k, v))
    if index.visible is not None:
        bias = torch.where(index.visible, bias, float("-inf"))
    mask = bias.expand(-1, windows, -1, -1).flatten(0, 1)[None].to(q.dtype)  # [1, N*P, Q, K]
    out = softmax_attention(q, k, v, mask, scale, fused)
    out = out.reshape(batch, heads, rows, columns, s, s, dim).permute(0, 2, 4, 3, 5, 1, 6)
    out = out.clone(memory_format=torch.contiguous_format)  # exporters may choose other strides of `out`
    return out.view(batch, rows * s * columns * s, heads * dim)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, fused: bool) -> Tensor:
    """softmax(scale * q k^T + mask) v of [B, M, Q or K, D] with a mask [1, M, Q, K].

    The softmax is explicit where PyTorch's fused kernels lack a derivative: in traces and transforms, which
    may need the second one or forward mode, and in training on a CPU, which needs the mask's gradient.
    """
    trains = torch.is_grad_enabled() and (q.requires_grad or mask.requires_grad)
    if not fused or is_traced(q) or (trains and q.device.type == "cpu"):
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        scores = scale * q.to(wide) @ k.to(wide).transpose(-2, -1) + mask
        return scores.softmax(dim=-1).to(v.dtype) @ v
    if q.device.type != "cuda":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    # cuDNN's kernel has returned wrong values with a mask. The choice of kernels is global to the process.
    lock = nullcontext() if torch.compiler.is_compiling() else SDPA_LOCK
    with lock, sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


SDPA_LOCK = Lock()


class Unsupported(ValueError):
    """An attention operator cannot serve a request; says why."""


class Backend(NamedTuple):
    """An attention operator that equals `plain_attention`."""

    prepare: Callable[[AttentionIndex, Request], Any]  # returns `AttentionIndex.tables`; raises Unsupported
    attend: Callable[[Tensor, AttentionIndex, Tensor, float], Tensor]  # qkv, index, bias, scale


BACKENDS: dict[str, Backend] = {"plain": Backend(lambda *_: None, plain_attention)}
"""Attention operators by name; the modules of ops/ add theirs. `auto` takes the last one that can run."""


def choose_backend(index: AttentionIndex, request: Request) -> AttentionIndex:
    """`index` with the operator that serves a request, and its tables.

    Raises:
        ValueError: a named operator is unknown or cannot serve it.
    """
    wanted, reasons = request.backend, []
    if wanted not in ("auto", *BACKENDS):
        raise ValueError(f"attention_backend must be one of auto, {', '.join(BACKENDS)}, got {wanted!r}")
    for name in reversed(BACKENDS) if wanted == "auto" else [wanted]:
        try:
            tables = BACKENDS[name].prepare(index, request)
        except Unsupported as reason:
            reasons.append(f"{name}: {reason}")
            continue
        why = "; ".join(reasons) if name == "plain" else ""
        if why and request.device.type == "cuda":
            warn_once(f"attention runs in PyTorch's own operations, slower than it could be. {why}")
        return replace(index, backend=name, fallback_reason=why, tables=tables)
    # a named one; the plain one never refuses
    raise ValueError(f"attention_backend {reasons[0]}; use auto, or one of {', '.join(BACKENDS)}")


warn_once = lru_cache(maxsize=None)(logger.warning)
HAS_EXPORT_FLAG = hasattr(torch.compiler, "_is_exporting_flag")  # from PyTorch 2.7 on


def is_traced(x: Tensor) -> bool:
    """Whether the model is exported, traced or transformed, so that the plain operator must run.

    True in torch.export, torch.jit.trace, torch.func, forward-mode AD and for tensors with operations of
    their own (fake, distributed, ...). False in torch.compile, which supports custom operators; PyTorch 2.6
    cannot tell that from a strict export, so there it is True where gradients are disabled. Later ones have a
    flag; `torch.compiler.is_exporting()`, which returns it, is always True in what PyTorch 2.11 compiles.
    """
    has_own_operations = type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__
    if has_own_operations or torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():
        return True
    if torch.compiler.is_compiling():
        exporting = torch.compiler._is_exporting_flag if HAS_EXPORT_FLAG else not torch.is_grad_enabled()
        return exporting or not torch.compiler.is_dynamo_compiling()  # the latter: export, not strict
    return forward_ad._current_level >= 0


# --- Attention ----------------------------------------------------------------------------------------------

POOLS: dict[str, Callable[[int, int], nn.Module]] = {
    "fc": lambda side, dim: nn.Linear(side * side, 1),
    "conv": lambda side, dim: nn.Conv2d(dim, dim, side, stride=side, groups=dim),
    "mean": lambda side, dim: nn.AvgPool2d(side),
    "max": lambda side, dim: nn.MaxPool2d(side),
}
"""Modules that make a coarse token of side x side fine ones of `dim` channels."""


ORIGINAL_BUFFERS = ("relative_position_index", "valid_ind_", "window_coords", "topk_cloest_coords_")
"""Prefixes of buffers of the original's attention that follow from the options; loading drops them."""


def rolled(x: Tensor, shift: int) -> Tensor:
    """[B, H, W, C] moved down and right by `shift` tokens, around the border."""
    return torch.roll(x, (shift, shift), dims=(1, 2)) if shift else x


def pad_and_roll(x: Tensor, window: int, shift: int, roll_first: bool) -> Tensor:
    """[B, H, W, C] -> the same with whole windows: zeros at the bottom and right, rolled by -`shift`."""
    rows, columns = padded_size(integer(x.shape[1]), integer(x.shape[2]), window)
    more = (0, 0, 0, columns - x.shape[2], 0, rows - x.shape[1])
    x = rolled(x, -shift if roll_first else 0)
    x = F.pad(x, more) if any(more) else x
    return rolled(x, 0 if roll_first else -shift)


def gather_bias(table: Tensor, index: Tensor) -> Tensor:
    """Rows of a table [U, Q, N] for every window: index [K, P] -> [N, P, Q, K].

    A gather is faster on a CPU, where PyTorch 2.6 cannot compile the gradient of an embedding for one key;
    elsewhere its gradient would be summed in any order, an embedding's is not.
    """
    if table.device.type == "cpu":
        table = table.permute(2, 1, 0).contiguous()
        columns = table.gather(2, index.t().flatten().expand(*table.shape[:2], -1))
        return columns.unflatten(2, index.t().shape).transpose(1, 2)
    return F.embedding(index, table.flatten(1)).unflatten(-1, table.shape[1:]).permute(3, 1, 2, 0)


class BiasTables(nn.ParameterList):
    """Bias tables [N, offsets], one per pooled level. It is called, so that hooks on it run, such as those
    that bring offloaded or sharded tables to the device, and take them away afterwards."""

    __call__ = nn.Module.__call__  # ParameterList forbids calls

    def forward(self, level: int, index: Tensor) -> Tensor:
        """Offsets by index, of one level: [K, Q] -> [N, Q, K]."""
        return gather_bias(self[level].t()[:, None], index).squeeze(2)

    def reset_parameters(self) -> None:
        """Truncated normal 0.02."""
        for table in self:
            trunc_normal_(table, std=0.02)


class FocalAttention(nn.Module):
    """Focal attention (paper, section 3.2): every token sees its window, a ring and pooled tokens."""

    roll_first = False  # whether the map is rolled before it is padded

    def __init__(
        self,
        dim: int,  # channels C
        num_heads: int,  # N; divides C
        window_size: int,  # s
        expand_size: int = 0,  # e, how far the ring reaches; 0 for none
        focal_window: int = 1,  # f, see the top: side of the region of level 0, in windows; odd
        pool: str = "none",  # how coarse tokens are made: none, or a key of POOLS
        pooled_levels: int = 0,
        shift_size: int = 0,  # the map is rolled by so many tokens before attention, and back after it
        qkv_bias: bool = True,
        qk_scale: float | None = None,  # factor of the scores; None, 0 or False for D ** -0.5
        proj_drop: float = 0.0,  # dropout after the output projection
        backend: str = "auto",  # auto, or a key of BACKENDS
        **bias_options: Any,  # arguments of `add_bias`
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.window_size, self.expand_size, self.focal_window = window_size, expand_size, focal_window
        self.pool, self.pooled_levels, self.shift_size = pool, pooled_levels, shift_size
        self.scale = qk_scale or self.head_dim**-0.5
        self.backend = backend
        self.add_bias(**bias_options)  # first, as in the original: optimizers number parameters
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def add_bias(self) -> None:
        """Add the three kinds of bias tables, under the original's names."""
        s, e, n = self.window_size, self.expand_size, self.num_heads
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * s - 1) ** 2, n))
        if e > 0:
            ring = torch.empty(1, n, s * s, len(ring_offsets(s, e)))
            self.relative_position_bias_table_to_neighbors = nn.Parameter(ring)
        self.reset_parameters()
        if self.pooled_levels > 0:
            sides = [s + self.focal_window + 2**level - 2 for level in range(self.pooled_levels)]
            tables = BiasTables(nn.Parameter(torch.empty(n, side**2)) for side in sides)
            self.relative_position_bias_table_to_windows = tables
            tables.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh bias tables: zeros in the own window, truncated normal 0.02 in the ring."""
        nn.init.zeros_(self.relative_position_bias_table)
        if self.expand_size > 0:
            trunc_normal_(self.relative_position_bias_table_to_neighbors, std=0.02)

    def forward(self, x: Tensor, *coarse: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C], of any size, padded by zeros to whole windows.

        `coarse` has the tokens of each pooled level, see `CoarseTokens`. The zeros are keys of Focal; of
        Focal-fast they only count in coarse tokens.
        """
        height, width = integer(x.shape[1]), integer(x.shape[2])  # Python's integers, also in torch.jit.trace
        x = pad_and_roll(x, self.window_size, self.shift_size, self.roll_first)
        qkv = self.qkv(torch.cat([x.flatten(1, 2), *coarse], dim=1))  # [B, S, 3C]
        qkv = qkv.unflatten(-1, (3, self.num_heads, self.head_dim))
        index = self.index(height, width, qkv)  # with the operator that `choose_backend` took
        bias = self.bias(index, x.dtype)
        x = BACKENDS[index.backend].attend(qkv, index, bias, self.scale)  # [B, T, C]
        x = self.unroll_and_crop(x.unflatten(1, (index.height, index.width)), height, width)
        return self.proj_drop(self.proj(x))

    def unroll_and_crop(self, x: Tensor, height: int, width: int) -> Tensor:
        """Undo `pad_and_roll`."""
        if self.roll_first:
            return rolled(x[:, :height, :width], self.shift_size)
        return rolled(x, self.shift_size)[:, :height, :width]

    def index(self, height: int, width: int, x: Tensor) -> AttentionIndex:
        """The keys of every window of an unpadded map, for the operator that serves inputs like `x`."""
        traced = is_traced(x)
        name = "plain" if traced else self.backend
        request = (name, x.device, x.dtype, self.num_heads, self.head_dim, torch.is_grad_enabled())
        return get_index(traced, *self.keys(height, width), request)

    def keys(self, height: int, width: int) -> tuple[Callable[..., Keys], tuple[Any, ...]]:
        """The function that finds the keys, and its arguments."""
        s, reach = self.window_size, (self.expand_size, self.focal_window)
        return focal_keys, (*padded_size(height, width, s), s, *reach, self.pooled_levels, self.shift_size)

    def bias(self, index: AttentionIndex, dtype: torch.dtype) -> Tensor:
        """Bias of the scores, the same in all windows: [N, 1, Q, K]."""
        own, *levels = index.bias_index
        parts = [gather_bias(self.relative_position_bias_table[:, None], own).squeeze(2)]
        if self.expand_size > 0:
            parts.append(self.relative_position_bias_table_to_neighbors.squeeze(0))  # one entry per slot
        for level, rows in enumerate(levels):
            parts.append(self.relative_position_bias_table_to_windows(level, rows))
        return torch.cat(parts, dim=-1)[:, None]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load, without what the original's state dict has beyond ours."""
        extra = tuple(prefix + name for name in ORIGINAL_BUFFERS)
        for key in [key for key in state_dict if key.startswith(extra)]:
            del state_dict[key]  # of a copy, which `load_state_dict` has made
        super()._load_from_state_dict(state_dict, prefix, *args)


class FocalFastAttention(FocalAttention):
    """Focal-fast attention: every token sees the fine and coarse tokens nearest to its window's centre.

    The original broke ties by an unstable sort, and released weights are trained with its choice. So the
    state dict stores the chosen keys (`topk_cloest_indice_k`, the original's spelling). They are used at the
    size they were made for, `train_resolution`; at other sizes ties go to the first token, row by row.
    """

    roll_first = True  # so that padding stays at the bottom and right, and is never a fine key

    def add_bias(self, topk: int, train_resolution: tuple[int, int]) -> None:  # type: ignore[override]
        """Add an MLP from offset to bias for every level, and the choice of `topk` keys of each level, or all
        if there are fewer, for maps of `train_resolution`."""
        self.topk = topk
        self.coord2rpb_all = nn.ModuleList(
            nn.Sequential(nn.Linear(2, self.head_dim), nn.ReLU(), nn.Linear(self.head_dim, self.num_heads))
            for _ in range(1 + self.pooled_levels)
        )
        self.key_buffers = [f"topk_cloest_indice_{level}" for level in range(1 + self.pooled_levels)]
        self.set_train_resolution(train_resolution)

    def set_train_resolution(self, map_size: tuple[int, int]) -> None:
        """Store the nearest keys of a map size in place of those that are stored."""
        self.train_resolution, old = map_size, self._buffers.get(self.key_buffers[0])
        device = None if old is None else old.device
        choice = nearest_keys(*map_size, self.window_size, self.topk, self.pooled_levels)
        for name, numbers in zip(self.key_buffers, choice, strict=True):
            self.register_buffer(name, torch.tensor(numbers, device=device))
        self.stored_bytes: tuple[bytes, ...] = tuple(keys.tobytes() for keys in choice)
        self.buffer_versions: tuple | None = None  # of the buffers when they were read
        self.buffers_read: list[Tensor] = []  # keeps them alive, so that no other has their address

    def reset_parameters(self) -> None:
        """Choose the stored keys anew."""
        self.set_train_resolution(self.train_resolution)

    def __getstate__(self) -> dict[str, Any]:
        """Without what was read: copies and pickles have buffers of their own."""
        return self.__dict__ | {"buffer_versions": None, "buffers_read": []}

    def stale_keys(self, state: Mapping[str, Any], prefix: str = "") -> list[str]:
        """Names of stored keys in a state that are not the nearest on a map of `train_resolution`, such as
        those of another input size, or averages cut to whole numbers. Of equally near tokens any will do.
        More than `topk` keys, or fewer though their map has more tokens, are of another model: PyTorch
        refuses their shape, so they are not listed."""
        given_keys = {name: state[prefix + name] for name in self.key_buffers if prefix + name in state}
        if not given_keys:
            return []
        (height, width), s, stale = self.train_resolution, self.window_size, []
        rows, columns = (side // s for side in padded_size(height, width, s))
        windows = grid(rows, columns)
        maps = ((windows * s + s // 2, height, width), (windows, rows, columns))  # of the keys of each level
        nearest = nearest_keys(height, width, s, self.topk, self.pooled_levels)
        for name, own, one_map, side in zip(self.key_buffers, nearest, maps, (s, 1), strict=False):
            given: Any = given_keys.get(name)
            if type(given) not in (Tensor, nn.Parameter):  # it cannot be read, as in fake mode
                continue
            is_odd = given.layout != torch.strided or given.is_meta or given.is_nested or given.is_quantized
            if not is_odd and given.ndim == 2:
                fewest = (len(given) - 1) * side + 1  # tokens of a map: its windows are in one row
                if not min(self.topk, fewest) <= given.shape[1] <= self.topk:
                    continue
            fits = not is_odd and given.shape == own.shape
            if not (fits and as_near(whole_numbers(given).detach().long().cpu().numpy(), own, *one_map)):
                stale.append(prefix + name)
        return stale

    @torch.compiler.assume_constant_result
    def refresh_stored_keys(self, loaded: bool = False) -> None:
        """Copy the stored keys to `stored_bytes` if they were loaded, moved or changed in place. A compiled
        model does this only when it is compiled and when a state dict is loaded.

        On a GPU, writing past the tensors' versions (`.data`, collectives) counts from the next
        `load_state_dict` on. Under torch.vmap over models, whose keys cannot be read, the last ones are used.
        """
        choice = [getattr(self, name) for name in self.key_buffers]
        if any(type(x) is not Tensor or x.is_meta for x in choice):
            return
        try:
            versions: tuple[Any, ...] = tuple(
                (x.data_ptr(), None if x.is_inference() else x._version) for x in choice
            )
            if choice[0].device.type == "cpu":  # `.data` and collectives write past the versions
                versions += tuple(string_at(x.data_ptr(), x.nbytes) for x in choice if x.is_contiguous())
        except RuntimeError:  # of torch.vmap's tensors, which have no memory of their own
            return

        def read() -> tuple[bytes, ...]:
            found = tuple(whole_numbers(keys).long().cpu().numpy().tobytes() for keys in choice)
            changed = dict(zip(self.key_buffers, choice, strict=True)) if found != self.stored_bytes else {}
            if stale := self.stale_keys(changed):
                why = "changed to keys that are not the nearest (averaged, and cut to whole numbers?)"
                warn_once(f"{', '.join(stale)}: {why}; those that were read before are used")
                return self.stored_bytes
            return found

        if loaded or versions != self.buffer_versions:  # loaded: inference tensors have no version to differ
            if choice[0].is_cuda:
                torch.cuda.current_stream(choice[0].device).synchronize()
            with ThreadPoolExecutor(1) as thread:  # where no transform and no mode of this one is active
                self.stored_bytes = thread.submit(read).result()
            self.buffer_versions, self.buffers_read = versions, choice

    def keys(self, height: int, width: int) -> tuple[Callable[..., Keys], tuple[Any, ...]]:
        """The function that finds the keys, and its arguments."""
        stored = None
        if (height, width) == self.train_resolution:
            self.refresh_stored_keys()
            stored = self.stored_bytes
        return focal_fast_keys, (height, width, self.window_size, self.topk, self.pooled_levels, stored)

    def bias(self, index: AttentionIndex, dtype: torch.dtype) -> Tensor:
        """Bias of every window's scores, [N, P, Q, K]; the MLPs get offsets of `dtype`."""
        *offsets, rows, step = index.bias_index
        levels = zip(self.coord2rpb_all, offsets, strict=True)
        table = torch.cat([mlp(offset.to(dtype)) for mlp, offset in levels])  # [R, N]
        return gather_bias(F.embedding(rows, table), step)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load. Keys that the state lacks, as averaged weights do, or that are stale stay the layer's own."""
        own = {prefix + name: getattr(self, name) for name in self.key_buffers}
        for key in own.keys() & state_dict.keys():
            if type(state_dict[key]) in (Tensor, nn.Parameter):
                state_dict[key] = whole_numbers(state_dict[key])
        kept = [*(own.keys() - state_dict.keys()), *self.stale_keys(state_dict, prefix)]
        if kept and self.stale_keys(own, prefix):  # as in memory that was never filled
            self.reset_parameters()
            own = {prefix + name: getattr(self, name) for name in self.key_buffers}
        if kept:
            names = ", ".join(sorted(kept))
            given = {key: state_dict[key] for key in kept if key in state_dict}
            of_this_size = any(not x.is_nested and x.shape == own[key].shape for key, x in given.items())
            level = logging.WARNING if of_this_size else logging.INFO
            why = "not there, or not the nearest (averaged, rounded, or of another input size or window)"
            logger.log(level, f"{names}: {why}, so the model's own stay")
        state_dict.update({key: own[key] for key in kept})
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.refresh_stored_keys(loaded=True)


class CoarseTokens(nn.ModuleList):
    """Makes the tokens of the pooled levels of an attention, by one module per level."""

    def __init__(self, attn: FocalAttention, dim: int) -> None:
        sides = [attn.window_size // 2**level for level in range(attn.pooled_levels)]
        super().__init__(POOLS[attn.pool](side, dim) for side in sides)
        self.sides = sides  # of cells
        self.pool, self.window_size, self.shift_size = attn.pool, attn.window_size, attn.shift_size
        self.roll_first = attn.roll_first

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, H, W, C] -> the tokens of each level, [B, P * 4^level, C]."""
        if self.sides:
            x = pad_and_roll(x, self.window_size, self.shift_size, self.roll_first)
        return [self.pooled(x, level) for level in range(len(self.sides))]

    def pooled(self, x: Tensor, level: int) -> Tensor:
        """Tokens of one level of a padded map. What cells do not fill is cropped evenly on both sides."""
        side, pool = self.sides[level], self[level]
        rows, columns = (n // self.window_size * 2**level for n in x.shape[1:3])
        top, left = (x.shape[1] - rows * side) // 2, (x.shape[2] - columns * side) // 2
        x = x[:, top : top + rows * side, left : left + columns * side]
        if self.pool != "fc":
            return pool(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        cells = x.unflatten(2, (columns, side)).unflatten(1, (rows, side))  # [B, rows, p, columns, p, C]
        cells = cells.permute(2, 4, 0, 1, 3, 5).flatten(2).flatten(0, 1)  # [p*p, B*rows*columns*C]
        return pool(cells.t()).view(x.shape[0], rows * columns, x.shape[3])


# --- The network --------------------------------------------------------------------------------------------


class FocalBlock(nn.Module):
    """Pre-norm transformer block with focal attention."""

    def __init__(
        self,
        attn: FocalAttention,
        dim: int,  # channels C
        mlp_ratio: float = 4.0,  # hidden channels of the MLP over C
        drop: float = 0.0,
        drop_path: float = 0.0,  # rate of stochastic depth
        layerscale: float | None = None,  # first value of the factors of both branches; None for no factors
    ) -> None:
        super().__init__()
        self.pool_layers = CoarseTokens(attn, dim)  # not in `attn`, as in the original's state dict
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.layerscale = layerscale
        self.gamma_1 = None if layerscale is None else nn.Parameter(torch.empty(dim))
        self.gamma_2 = None if layerscale is None else nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh factors of layer scale."""
        for gamma in (self.gamma_1, self.gamma_2):
            if gamma is not None and self.layerscale is not None:
                nn.init.constant_(gamma, self.layerscale)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load, without the mask that the original's block keeps if it shifts."""
        state_dict.pop(f"{prefix}attn_mask", None)  # of a copy
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        if isinstance(x, torch.fx.Proxy):  # torch.fx cannot trace sizes: record the block as one module
            return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})
        y = self.norm1(x)
        y = self.attn(y, *self.pool_layers(y))
        x = x + self.drop_path(y if self.gamma_1 is None else y * self.gamma_1)
        y = self.mlp(self.norm2(x))
        return x + self.drop_path(y if self.gamma_2 is None else y * self.gamma_2)

    def __prepare_scriptable__(self) -> None:
        """Refuse `torch.jit.script`."""
        reason = "a focal model cannot be scripted, since keys follow from the size of its input"
        raise NotImplementedError(f"{reason}: use torch.jit.trace or torch.export")


class PatchEmbed(nn.Module):
    """Convolution that shrinks the map, then LayerNorm: the stem and the step between two stages. Rows and
    columns left over at the bottom and right are ignored; the original refuses them."""

    def __init__(
        self,
        in_chans: int,
        dim: int,  # channels of the output
        stride: int,  # factor by which the map shrinks
        overlap: bool = False,  # patches overlap: kernel 7 stride 4, kernel 3 stride 2
        norm: bool = True,  # LayerNorm after the convolution
        pre_norm: bool = False,  # GroupNorm with one group before it
    ) -> None:
        super().__init__()
        self.pre_norm = nn.GroupNorm(1, in_chans) if pre_norm else nn.Identity()
        kernel, padding = (2 * stride - 1, stride // 2) if overlap else (stride, 0)
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride, padding)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()
        self.kernel, self.stride, self.padding = kernel, stride, padding

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the map made from an input of `height` x `width`."""
        more = 2 * self.padding - self.kernel
        return (height + more) // self.stride + 1, (width + more) // self.stride + 1

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, H/stride, W/stride, C]."""
        return self.norm(self.proj(self.pre_norm(x)).permute(0, 2, 3, 1))


class FocalStage(nn.Module):
    """Blocks at one resolution, and the patch embedding that leads to the next stage, if there is one."""

    def __init__(self, blocks: Sequence[FocalBlock], downsample: PatchEmbed | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.use_checkpoint = False  # recompute activations in the backward pass of training

    def forward(self, x: Tensor, with_own_map: bool = False) -> Any:
        """[B, H, W, C] -> the next stage's map; `with_own_map` the last block's and the next stage's map."""
        recompute = self.use_checkpoint and self.training
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        after = x if self.downsample is None else self.downsample(x.permute(0, 3, 1, 2))
        return (x, after) if with_own_map else after


class FocalTransformer(nn.Module):
    """Classifier and backbone, with timm's interface: images [B, in_chans, H, W] -> logits [B, num_classes].
    Raises ValueError, which lists all options that contradict each other."""

    output_fmt = "NHWC"
    global_pool: SelectAdaptivePool2d

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,  # pixels, one side or two; sets shapes, other sizes run as well
        patch_size: int = 4,  # stride of the stem
        in_chans: int = 3,
        num_classes: int = 1000,  # 0 for no classifier
        embed_dim: int = 96,  # channels of the first stage; each following stage doubles them
        depths: Sequence[int] = (2, 2, 6, 2),  # blocks of each stage
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,  # s; cut to the map's smaller side; a window that spans it has no ring or shift
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,  # factor of the scores; None, 0 or False for D ** -0.5
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,  # stochastic depth of the last block, rising from 0 at the first
        ape: bool = False,  # learned absolute position embedding, resized bicubically to other sizes
        patch_norm: bool = True,  # LayerNorm in the stem
        use_shift: bool = False,  # roll the map by s // 2 in odd blocks
        focal_pool: str = "none",  # how coarse tokens are made: none, or a key of POOLS
        focal_stages: Sequence[int] = (0, 1, 2, 3),  # stages that have coarse tokens
        focal_levels: Sequence[int] = (1, 1, 1, 1),  # 0 own window, 1 + ring, 2 + one pooled level, 3 + two
        focal_windows: Sequence[int] = (7, 5, 3, 1),  # f, side of the region of level 0, in windows; odd
        focal_topk: int = 128,  # Focal-fast: keys of each level; it has focal_levels 1 or 2
        expand_sizes: Sequence[int] = (3, 3, 3, 3),  # how far the ring reaches, tokens
        expand_layer: str = "all",  # even: blocks 0, 2, ... have no ring; odd: blocks 1, 3, ...
        use_conv_embed: bool = False,  # overlapping patch embeddings
        use_layerscale: bool = False,  # learned factor for each channel of both branches of a block
        layerscale_value: float = 1e-4,
        use_pre_norm: bool = False,  # GroupNorm before the downsampling convolutions
        use_checkpoint: bool = False,  # recompute activations in the backward pass of training
        kind: str = "focal",  # focal, or focalv2 (Focal-fast)
        attention_backend: str = "auto",  # auto, or a key of BACKENDS
        global_pool: str = "avg",  # avg, max, avgmax, catavgmax, or "" for the map itself
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options = dict(locals())
        super().__init__()
        check_options(options)
        self.in_chans, self.smallest_side = in_chans, smallest_side(options)
        self.feature_dims = tuple(embed_dim * 2**i for i in range(len(depths)))
        self.num_features = self.feature_dims[-1]
        layerscale = layerscale_value if use_layerscale else None
        rates = iter([drop_path_rate * block / max(sum(depths) - 1, 1) for block in range(sum(depths))])
        with nullcontext() if device is None else torch.device(device):
            self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size, use_conv_embed, patch_norm)
            self.train_resolution = size = self.patch_embed.output_size(*to_2tuple(img_size))  # in tokens
            positions = torch.zeros(1, size[0] * size[1], embed_dim)
            self.absolute_pos_embed = nn.Parameter(positions) if ape else None
            self.pos_drop = nn.Dropout(drop_rate)
            self.layers = nn.Sequential()
            for i, (dim, depth) in enumerate(zip(self.feature_dims, depths, strict=True)):
                attns = [make_attention(options, i, block, size) for block in range(depth)]
                blocks = [FocalBlock(a, dim, mlp_ratio, drop_rate, next(rates), layerscale) for a in attns]
                last = i == len(depths) - 1
                down = None if last else PatchEmbed(dim, 2 * dim, 2, use_conv_embed, pre_norm=use_pre_norm)
                self.layers.append(FocalStage(blocks, down))
                size = size if down is None else down.output_size(*size)
            self.norm: nn.Module = nn.LayerNorm(self.num_features)
            self.apply(initialise)
            self.reset_parameters()
            self.reset_classifier(num_classes, global_pool)
        self.set_grad_checkpointing(use_checkpoint)
        if dtype is not None:
            self.to(dtype)
        self.feature_info = [
            {"num_chs": dim, "reduction": patch_size * 2**i, "module": f"layers.{i}.blocks.{depth - 1}"}
            for i, (dim, depth) in enumerate(zip(self.feature_dims, depths, strict=True))
        ]  # the last block, since a stage returns the next stage's map

    def reset_parameters(self) -> None:
        """A fresh position embedding: truncated normal 0.02."""
        if self.absolute_pos_embed is not None:
            trunc_normal_(self.absolute_pos_embed, std=0.02)

    def init_weights(self) -> None:
        """Fresh weights and stored keys, as for a model that `to_empty` has moved from the meta device."""
        for module in self.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        self.apply(initialise)

    @property
    def stages(self) -> list[FocalStage]:
        """The stages, `layers`, as a list."""
        return cast("list[FocalStage]", [*self.layers])

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W], of `smallest_side` pixels or more, to logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] to the normalised last map [B, H/32, W/32, C] (by default)."""
        return self.norm(self.layers(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Last map [B, H, W, C] to logits [B, num_classes], or to what enters the classifier."""
        x = self.global_pool(x)
        return x if pre_logits else self.head(x)

    def stem(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] to the first map [B, H/patch_size, W/patch_size, C]."""
        check_images(x, self.smallest_side)
        x = self.patch_embed(x)
        if self.absolute_pos_embed is not None:
            size = (x.shape[1], x.shape[2])
            x = x + resized_positions(self.absolute_pos_embed, self.train_resolution, size)
        return self.pos_drop(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps of chosen stages, after the stage's last block and before its downsampler; like timm's.

        Args:
            x: images, [B, in_chans, H, W].
            indices: stages; a number n for the last n, None for all.
            norm: apply the final norm to the last stage's map.
            stop_early: do not run stages after the last chosen one.
            output_fmt: NCHW | NHWC, of the maps.
            intermediates_only: return only the list of maps, without the last map [B, H, W, C] before it.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be NCHW or NHWC, got {output_fmt!r}")
        wanted, last, maps = self.chosen_stages(indices), len(self.layers) - 1, []
        until = max(wanted) if stop_early or intermediates_only else last
        x = self.stem(x)
        for i, stage in enumerate(self.layers[: until + 1]):
            stage_map, x = stage(x, True)
            if i in wanted:
                maps.append(self.norm(stage_map) if norm and i == last else stage_map)
        maps = [m.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else m for m in maps]
        if intermediates_only:
            return maps
        return (self.norm(stage_map) if until == last else stage_map), maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the maps of chosen stages do not need; returns these stages, counted from the first.
        If the last stage goes, norm, pooling and classifier go too."""
        wanted = self.chosen_stages(indices)
        shortened = max(wanted) < len(self.layers) - 1
        del self.layers[max(wanted) + 1 :]
        self.stages[-1].downsample = None
        self.num_features = self.feature_dims[max(wanted)]
        if prune_norm or shortened:
            self.norm = nn.Identity().train(self.training)
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return wanted

    def chosen_stages(self, indices: int | Sequence[int] | None) -> list[int]:
        """The stages that `indices` of `forward_intermediates` mean."""
        count = len(self.layers)
        indices = count if indices is None else indices
        named = [*range(-indices, 0)] if isinstance(indices, int) else [*indices]
        if not named or min(named) < -count or max(named) >= count:
            raise ValueError(
                f"indices must name stages 0 to {count - 1} (or -{count} to -1), or say how many of the last "
                f"are meant, got {indices}"
            )
        return [i % count for i in named]

    def get_classifier(self) -> nn.Module:
        """The layer that makes logits."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one; `global_pool` None keeps the pooling."""
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool = SelectAdaptivePool2d(pool_type=pool, flatten=bool(pool), input_fmt="NHWC")
        self.num_classes = num_classes
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        like = next(self.parameters())
        self.head: nn.Module = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)
        initialise(self.head)
        for module in (self.global_pool, self.head):
            module.train(self.training)

    def map_sizes(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Rows and columns of the map of every stage; `size` is that of the first."""
        sizes = [size]
        for stage in self.stages[:-1]:
            sizes.append(cast(PatchEmbed, stage.downsample).output_size(*sizes[-1]))
        return sizes

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Set the input size for which position embedding and nearest keys are stored. Other sizes run
        without it. The embedding becomes another parameter, of the new size: call this before the optimizer
        is made. Nearest keys are chosen anew; windows stay as they are."""
        height, width = to_2tuple(img_size)
        if min(height, width) < self.smallest_side:
            raise ValueError(f"img_size must be at least {self.smallest_side} pixels, got {height} x {width}")
        first = self.patch_embed.output_size(height, width)
        if (old := self.absolute_pos_embed) is not None:
            new = resized_positions(old.detach(), self.train_resolution, first).flatten(1, 2).clone()
            self.absolute_pos_embed = nn.Parameter(new, old.requires_grad)
        self.train_resolution = first
        for stage, size in zip(self.stages, self.map_sizes(first), strict=True):
            for layer in stage.modules():
                if isinstance(layer, FocalFastAttention):
                    layer.set_train_resolution(size)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass of training instead of keeping them."""
        for stage in self.stages:
            stage.use_checkpoint = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters for timm's layer-wise learning rates: the stem, each block (if `coarse`, each
        stage) with a downsampler or norm that follows it, the classifier."""
        block = r"^layers\.(\d+)" if coarse else r"^layers\.(\d+)\.blocks\.(\d+)"
        after = [(r"^layers\.(\d+)\.downsample", (99999,)), (r"^norm", (99999,))]  # with the one before
        return {
            "stem": r"^patch_embed|^absolute_pos_embed",
            "blocks": [(block, None), *after[1 if coarse else 0 :]],
        }

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, beyond biases and one-dimensional ones."""
        keywords = ("absolute_pos_embed", "relative_position_bias_table")
        return {name for name, _ in self.named_parameters() if any(word in name for word in keywords)}

    def attention_backends(self, dtype: torch.dtype = torch.float32) -> list[str]:
        """Attention operator of each block at `img_size` for activations of `dtype`; where `auto` can only
        take the plain one, with the reason."""
        like, found = torch.empty(0, dtype=dtype, device=next(self.parameters()).device), []
        for stage, size in zip(self.stages, self.map_sizes(self.train_resolution), strict=True):
            for layer in (m for m in stage.modules() if isinstance(m, FocalAttention)):
                index = layer.index(*size, like)
                reason = f" ({index.fallback_reason})" if index.fallback_reason else ""
                found.append(index.backend + reason)
        return found


def make_attention(
    options: Mapping[str, Any], stage: int, block: int, map_size: tuple[int, int]
) -> FocalAttention:
    """The attention of one block whose map at `img_size` is `map_size`, from the model's options."""
    window, levels = min(options["window_size"], *map_size), pooled_levels(options, stage)
    fits_one_window = min(map_size) <= options["window_size"]  # in height or width
    if levels and window < 2 ** (levels - 1):
        cells = f"a window of {window} cannot be divided into {2 ** (levels - 1)} cells a side"
        raise ValueError(f"the model's options do not fit together:\n  stage {stage}: {cells}")
    if options["kind"] == "focal":
        may_have_ring = options["focal_levels"][stage] > 0 and not fits_one_window
        has_ring = may_have_ring and block % 2 in WITH_RING[options["expand_layer"]]
        expand = options["expand_sizes"][stage] if has_ring else 0
        family = {"expand_size": expand, "focal_window": options["focal_windows"][stage]}
    else:
        family = {"topk": options["focal_topk"], "train_resolution": map_size}
    return FAMILIES[options["kind"]](
        options["embed_dim"] * 2**stage,
        options["num_heads"][stage],
        window,
        pool=options["focal_pool"],
        pooled_levels=levels,
        shift_size=window // 2 if options["use_shift"] and not fits_one_window and block % 2 == 1 else 0,
        qkv_bias=options["qkv_bias"],
        qk_scale=options["qk_scale"],
        proj_drop=options["drop_rate"],
        backend=options["attention_backend"],
        **family,
    )


@torch.fx.wrap  # symbolic traces leave what looks at sizes to be called
def resized_positions(embedding: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Absolute position embedding [1, T, C] of one map size at another: [1, H, W, C]."""
    embedding = embedding.unflatten(1, old)
    if new == old:
        return embedding
    wide = torch.float64 if embedding.dtype == torch.float64 else torch.float32
    resized = F.interpolate(embedding.permute(0, 3, 1, 2).to(wide), new, mode="bicubic", antialias=True)
    return resized.permute(0, 2, 3, 1).to(embedding.dtype)


@torch.fx.wrap
def check_images(x: Tensor, smallest_side: int) -> None:
    """Raise ValueError for images that cannot run; other channels than the stem's are PyTorch's to refuse.

    To torch.compile and torch.export this makes the image size a constant, since keys depend on it; only the
    batch size can be dynamic.
    """
    if x.ndim != 4:
        raise ValueError(f"expected images [B, C, H, W], got a tensor of shape {list(x.shape)}")
    height, width = integer(x.shape[2]), integer(x.shape[3])
    if min(height, width) < smallest_side:
        least = f"{smallest_side} x {smallest_side}"
        raise ValueError(f"images must be at least {least} pixels, got {height} x {width}: resize")


def initialise(module: nn.Module) -> None:
    """Linear layers truncated normal 0.02 with zero bias; norms and convolutions as PyTorch has them."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# --- Options ------------------------------------------------------------------------------------------------

FAMILIES: dict[str, type[FocalAttention]] = {"focal": FocalAttention, "focalv2": FocalFastAttention}
WITH_RING = {"all": (0, 1), "even": (1,), "odd": (0,)}  # by expand_layer: block % 2 of blocks with a ring


def smallest_side(options: Mapping[str, Any]) -> int:
    """Pixels that an image needs on a side for the last stage to have a token; never fewer than 32."""
    return max(32, options["patch_size"] * 2 ** (len(options["depths"]) - 1))


def pooled_levels(options: Mapping[str, Any], stage: int) -> int:
    """How many pooled levels the attentions of a stage have."""
    pools = options["focal_pool"] != "none" and stage in options["focal_stages"]
    return max(options["focal_levels"][stage] - 1, 0) if pools else 0


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError for options that contradict each other, with every problem."""
    per_stage = ("depths", "num_heads", "focal_levels", "focal_windows", "expand_sizes", "focal_stages")
    wrong = [key for key in per_stage if not isinstance(options[key], Sequence)]
    if wrong:
        given = ", ".join(f"{key}={options[key]!r}" for key in wrong)
        raise ValueError(f"expected a list with an entry for each stage, got {given}")
    stages, sides, least = len(options["depths"]), to_2tuple(options["img_size"]), smallest_side(options)
    unknown = set(options["focal_stages"]) - {*range(max(stages, 4))}  # the default names four
    conv = options["use_conv_embed"]
    checks = [
        ("img_size", len(sides) == 2 and min(sides) >= least, f"a side or two of at least {least} pixels"),
        ("num_classes", options["num_classes"] >= 0, "0 (no classifier) or more"),
        ("mlp_ratio", options["mlp_ratio"] > 0, "positive"),
        ("depths", min(options["depths"], default=0) >= 1, "at least one stage of at least one block"),
        ("patch_size", not conv or options["patch_size"] == 4, "4 with use_conv_embed, whose stride is 4"),
        ("focal_stages", not unknown, f"stages from 0 to {max(stages, 4) - 1}"),
    ]
    choices = {"kind": [*FAMILIES], "focal_pool": ["none", *POOLS], "expand_layer": [*WITH_RING]}
    choices["attention_backend"] = ["auto", *BACKENDS]
    checks += [(key, options[key] in names, f"one of {', '.join(names)}") for key, names in choices.items()]
    ring_options = () if options["kind"] == "focalv2" else ("focal_windows", "expand_sizes")
    for key in ("num_heads", "focal_levels", *ring_options):
        fits = len(options[key]) == stages and all(isinstance(n, Integral) for n in options[key])
        checks.append((key, fits, f"a whole number for each of the {stages} depths"))
    for key in ("patch_size", "in_chans", "embed_dim", "window_size", "focal_topk"):
        fits = isinstance(options[key], Integral) and options[key] >= 1
        checks.append((key, fits, "a whole number, at least 1"))
    for key in ("drop_rate", "drop_path_rate"):
        checks.append((key, 0 <= options[key] < 1, "in [0, 1)"))
    problems = [f"{key} must be {text}, got {options[key]!r}" for key, fits, text in checks if not fits]
    if not problems:
        problems = [problem for stage in range(stages) for problem in _stage_problems(options, stage)]
    if problems:
        raise ValueError("the model's options do not fit together:\n  " + "\n  ".join(problems))


def _stage_problems(options: Mapping[str, Any], stage: int) -> list[str]:
    """What is wrong in one stage."""
    dim, heads, window = options["embed_dim"] * 2**stage, options["num_heads"][stage], options["window_size"]
    levels, pools = options["focal_levels"][stage], pooled_levels(options, stage) > 0
    checks = [(heads >= 1 and dim % heads == 0, f"num_heads must divide the {dim} channels, got {heads}")]
    if options["kind"] == "focalv2":
        need = "focal_levels 2 of Focal-fast needs a pool: set focal_pool or list the stage in focal_stages"
        checks.append((levels in (1, 2), f"Focal-fast has focal_levels 1 or 2, got {levels}"))
        checks.append((levels != 2 or pools, need))
    else:
        expand, focal_window = options["expand_sizes"][stage], options["focal_windows"][stage]
        fits = f"expand_sizes must lie between 0 and the window size {window}, got {expand}"
        checks.append((levels in (0, 1, 2, 3), f"focal_levels must be 0 to 3, got {levels}"))
        checks.append((0 <= expand <= window, fits))
        is_odd = focal_window % 2 == 1 and focal_window > 0
        checks.append((not pools or is_odd, f"focal_windows must be odd, from 1 on, got {focal_window}"))
    return [f"stage {stage}: {text}" for fits, text in checks if not fits]
