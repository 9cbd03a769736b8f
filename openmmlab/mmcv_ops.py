"""A replacement for `mmcv._ext`, the compiled operators that mmcv-lite lacks, by torchvision's operators.

Importing this module installs it, unless mmcv has compiled operators. Import it before `mmcv.ops` and
`mmdet.models`: first in a config's `custom_imports`. The functions below have the names and arguments with
which `mmcv.ops` (mmcv 2.1) calls them; they fill tensors of the caller, and mmcv defines the gradients. Half
precision is computed in float32 and rounded at the end.

Legend: N boxes, K regions, B images, C channels, H W rows and columns of a map, h w of a region's grid.
"""

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.ops import sigmoid_focal_loss

NAME = "mmcv._ext"
HALVES = (torch.float16, torch.bfloat16)


def full_precision(x: Tensor) -> Tensor:
    """Half precision as float32; other types as they are."""
    return x.float() if x.dtype in HALVES else x


# --- Boxes --------------------------------------------------------------------------------------------------


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices, best first, of the boxes that overlap no better kept box by more than `iou_threshold`.

    Args:
        boxes: [N, 4], left, top, right, bottom.
        scores: [N].
        offset: 1 where right and bottom count as part of a box (a box is right - left + 1 wide), else 0.
    """
    wider = full_precision(boxes) + boxes.new_tensor([0, 0, offset, offset])
    return torch.ops.torchvision.nms(wider, scores.to(wider.dtype), iou_threshold)


DECAYS: dict[int, Callable[[np.ndarray, float, float], np.ndarray]] = {
    0: lambda iou, threshold, sigma: iou < threshold,
    1: lambda iou, threshold, sigma: np.where(iou < threshold, 1, 1 - iou),
    2: lambda iou, threshold, sigma: np.exp(-(iou**2) / sigma),
}
"""The factor of a score by its box's overlap, for mmcv's methods 0 (naive), 1 (linear) and 2 (gaussian)."""


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS (Bodla et al. 2017): each box taken lowers the scores of those that overlap it.

    Args:
        boxes: [N, 4] on the CPU.
        scores: [N].
        dets: [N, 5], filled with boxes and lowered scores in the order in which boxes are taken.
        iou_threshold: overlap from which `naive` and `linear` act.
        sigma: width of `gaussian`.
        min_score: boxes whose score falls below it are removed.
        method: 0 naive, 1 linear, 2 gaussian.
        offset: see `nms`.

    Returns:
        Indices of the boxes taken, at most N.
    """
    corners, left = full_precision(boxes).numpy(), full_precision(scores).numpy().copy()
    sides = corners[:, 2:] - corners[:, :2] + offset
    areas = sides[:, 0] * sides[:, 1]
    rows = np.arange(len(corners))
    taken, taken_scores = [], []
    while len(rows):
        best = int(left.argmax())
        row = rows[best]
        taken.append(row)
        taken_scores.append(left[best])
        top_left = np.maximum(corners[row, :2], corners[rows, :2])
        shared = (np.minimum(corners[row, 2:], corners[rows, 2:]) - top_left + offset).clip(min=0)
        overlap = shared[:, 0] * shared[:, 1]
        iou = overlap / np.maximum(areas[row] + areas[rows] - overlap, np.finfo(areas.dtype).tiny)
        left = left * DECAYS[method](iou, iou_threshold, sigma).astype(left.dtype)
        stay = left >= min_score
        stay[best] = False
        rows, left = rows[stay], left[stay]
    indices = torch.tensor(np.array(taken, dtype=np.int64))
    dets[: len(indices), :4] = boxes[indices]
    dets[: len(indices), 4] = torch.tensor(np.array(taken_scores, dtype=left.dtype))
    return indices


# --- Regions ------------------------------------------------------------------------------------------------


def _grid(options: dict[str, Any]) -> tuple[Any, ...]:
    """torchvision's arguments from those of mmcv's roi_align; pool_mode must be 1, for `avg`."""
    if options["pool_mode"] != 1:
        refuse("roi_align with pool_mode='max'")
    return tuple(options[name] for name in ("spatial_scale", "aligned_height", "aligned_width"))


def roi_align_forward(
    input: Tensor, rois: Tensor, output: Tensor, argmax_y: Tensor, argmax_x: Tensor, **options: Any
) -> None:
    """Averages of bilinear samples in each cell of a grid over each region.

    Args:
        input: maps [B, C, H, W].
        rois: [K, 5], image and box.
        output: filled, [K, C, h, w].
        argmax_y: unused, like `argmax_x`.
        options: mmcv's: aligned_height and aligned_width are h and w; spatial_scale is pixels of the map per
            pixel of the box; sampling_ratio is samples per cell and side, 0 for as many as the cell has
            pixels; aligned is whether pixel centres are at half coordinates.
    """
    maps = full_precision(input)
    grid = (*_grid(options), options["sampling_ratio"], options["aligned"])
    output.copy_(torch.ops.torchvision.roi_align(maps, rois.to(maps.dtype), *grid))


def roi_align_backward(
    grad_output: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor, grad_input: Tensor, **options: Any
) -> None:
    """Fills `grad_input` [B, C, H, W] from `grad_output` [K, C, h, w]; the rest as in `roi_align_forward`."""
    grad = full_precision(grad_output)
    grid = (*_grid(options), *grad_input.shape, options["sampling_ratio"], options["aligned"])
    grad_input.copy_(torch.ops.torchvision._roi_align_backward(grad, rois.to(grad.dtype), *grid))


# --- Deformable convolution ---------------------------------------------------------------------------------


def _deformed(tensors: list[Tensor], geometry: tuple[Any, ...]) -> Tensor:
    """torchvision's convolution on input, weight, offset, mask and bias."""
    return torch.ops.torchvision.deform_conv2d(*map(full_precision, tensors), *geometry)


def _deformed_gradients(grad: Tensor, tensors: list[Tensor], geometry: tuple[Any, ...]) -> list[Tensor]:
    """Gradients of input, weight, offset, mask and bias."""
    tensors = [full_precision(x) for x in tensors]
    backward = torch.ops.torchvision._deform_conv2d_backward
    gradients = list(backward(full_precision(grad), *tensors, *geometry))
    border = _on_border(tensors[2], tensors[1].shape[2:], geometry)
    gradients[2] = gradients[2].view(*border.shape[:4], 2, *border.shape[4:])
    gradients[2] = gradients[2].masked_fill(border.unsqueeze(4), 0).view_as(tensors[2])
    return gradients


def _on_border(offset: Tensor, kernel: Sequence[int], geometry: tuple[Any, ...]) -> Tensor:
    """Which samples lie in row or column -1 exactly, [B, deformable groups, rows, columns, H_out, W_out].

    Their offset has no gradient in mmcv, but one in torchvision; in row H or column W it has none in both.
    """
    moved = offset.unflatten(1, (-1, *kernel, 2))
    strides, paddings, dilations = geometry[0:2], geometry[2:4], geometry[4:6]
    (rows, y), (columns, x) = (
        (dilation * torch.arange(taps), stride * torch.arange(side) - padding)
        for taps, side, stride, padding, dilation in zip(
            kernel, offset.shape[2:], strides, paddings, dilations, strict=True
        )
    )
    down = (rows[:, None, None, None] + y[:, None]).to(offset.device)
    right = (columns[:, None, None] + x).to(offset.device)
    return (moved[..., 0, :, :] + down == -1) | (moved[..., 1, :, :] + right == -1)


def _first_values(x: Tensor, channels: int, like: Tensor) -> Tensor:
    """What mmcv's modulated convolution reads of offsets or a mask: the first values of each image.

    Args:
        x: [B, channels, H_out, W_out] or more values per image: DyHead's maps are larger than its output.
        channels: that the convolution needs.
        like: the output, [B, C_out, H_out, W_out].

    Returns:
        [B, channels, H_out, W_out].

    Raises:
        ValueError: there are fewer values.
    """
    shape = (len(like), channels, *like.shape[2:])
    if len(x) < shape[0] or x[0].numel() < math.prod(shape[1:]):
        raise ValueError(
            f"modulated_deform_conv: expected offsets or a mask of {shape} or larger, got {tuple(x.shape)}"
        )
    return x[: shape[0]].flatten(1)[:, : math.prod(shape[1:])].view(shape)


def _fill_first(target: Tensor, values: Tensor) -> None:
    """Fill the values that `_first_values` reads with `values`, the others with 0."""
    missing = target[0].numel() - values[0].numel()
    padded = functional.pad(values.flatten(1), (0, missing, 0, len(target) - len(values)))
    target.copy_(padded.view_as(target))


def _plain(input: Tensor, weight: Tensor, offset: Tensor) -> list[Tensor]:
    """The arguments of `_deformed` for a convolution without mask and bias."""
    return [input, weight, offset, input.new_zeros(len(input), 0), weight.new_zeros(len(weight))]


def _geometry_v1(sizes: dict[str, int]) -> tuple[Any, ...]:
    """torchvision's arguments from those of mmcv's deform_conv."""
    pairs = [sizes[name] for name in ("dH", "dW", "padH", "padW", "dilationH", "dilationW")]
    return (*pairs, sizes["group"], sizes["deformable_group"], False)


def _geometry_v2(sizes: dict[str, int]) -> tuple[Any, ...]:
    """torchvision's arguments from those of mmcv's modulated_deform_conv."""
    pairs = [sizes[f"{name}_{side}"] for name in ("stride", "pad", "dilation") for side in "hw"]
    return (*pairs, sizes["group"], sizes["deformable_group"], True)


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    **sizes: int,
) -> None:
    """Convolution whose samples are moved by `offset` (Dai et al. 2017).

    Args:
        input: [B, C, H, W].
        weight: [C_out, C / groups, rows, columns].
        offset: [B, deformable groups * rows * columns * 2, H_out, W_out], rows before columns.
        output: filled, [B, C_out, H_out, W_out].
        columns: unused, like `ones`.
        sizes: strides, paddings, dilations and groups under mmcv's names.
    """
    output.copy_(_deformed(_plain(input, weight, offset), _geometry_v1(sizes)))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **sizes: int,
) -> None:
    """Fills `grad_input` and `grad_offset`, and stores the weight's gradient in `columns`."""
    gradients = _deformed_gradients(grad_output, _plain(input, weight, offset), _geometry_v1(sizes))
    grad_input.copy_(gradients[0])
    grad_offset.copy_(gradients[2])
    columns.resize_(weight.shape).copy_(gradients[1])


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    **sizes: int,
) -> None:
    """Fills `grad_weight`, from `columns` if `deform_conv_backward_input` was called before."""
    if columns.shape == grad_weight.shape:
        grad_weight.copy_(columns)
    else:
        tensors = _plain(input, torch.zeros_like(grad_weight), offset)
        grad_weight.copy_(_deformed_gradients(grad_output, tensors, _geometry_v1(sizes))[1])
    columns.resize_(0)


def _offset_and_mask(
    offset: Tensor, mask: Tensor, weight: Tensor, like: Tensor, sizes: dict[str, int]
) -> list[Tensor]:
    """Both as large as the output, which `like` has the shape of."""
    samples = sizes["deformable_group"] * weight.shape[2] * weight.shape[3]
    return [_first_values(offset, 2 * samples, like), _first_values(mask, samples, like)]


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    with_bias: bool,
    **sizes: int,
) -> None:
    """`deform_conv_forward` with a factor per sample, `mask` [B, deformable groups * rows * columns, ...].

    Larger offsets and masks: see `_first_values`.
    """
    bias = bias if with_bias else weight.new_zeros(len(weight))
    moves = _offset_and_mask(offset, mask, weight, output, sizes)
    output.copy_(_deformed([input, weight, *moves, bias], _geometry_v2(sizes)))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    with_bias: bool,
    **sizes: int,
) -> None:
    """Fills the other arguments named `grad_...` from `grad_output`."""
    moves = _offset_and_mask(offset, mask, weight, grad_output, sizes)
    tensors = [input, weight, *moves, weight.new_zeros(len(weight))]
    gradients = _deformed_gradients(grad_output, tensors, _geometry_v2(sizes))
    grad_input.copy_(gradients[0])
    grad_weight.copy_(gradients[1])
    _fill_first(grad_offset, gradients[2])
    _fill_first(grad_mask, gradients[3])
    if with_bias:
        grad_bias.copy_(gradients[4])


# --- Focal loss (mmdet calls it on CUDA) --------------------------------------------------------------------


LARGEST_SCORE = 1e4  # of infinite ones loss and gradient would be 0 * inf


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss (Lin et al. 2017) of each score.

    Args:
        input: scores before the sigmoid, [N, classes].
        target: class of each row, [N]; the number of classes for background.
        weight: must be empty; weights per class are not supported.
        output: filled, [N, classes].
        gamma: exponent.
        alpha: weight of the row's own class; the others have 1 - alpha.
    """
    if weight.numel():
        refuse("sigmoid_focal_loss with a weight per class")
    scores = full_precision(input).clamp(-LARGEST_SCORE, LARGEST_SCORE)
    wanted = target[:, None] == torch.arange(input.shape[1], device=target.device)
    output.copy_(sigmoid_focal_loss(scores, wanted.to(scores.dtype), alpha, gamma))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Fills `grad_input` [N, classes] with the derivative of each loss with respect to its score.

    With z the score, or its negative where another class is wanted, a loss is a * sigmoid(-z)^gamma *
    softplus(-z). Autograd would divide by the power's base, which may be 0.
    """
    scores = full_precision(input.detach()).clamp(-LARGEST_SCORE, LARGEST_SCORE)
    wanted = (target[:, None] == torch.arange(input.shape[1], device=target.device)).to(scores.dtype)
    sign, share = 2 * wanted - 1, alpha * wanted + (1 - alpha) * (1 - wanted)
    if alpha < 0:  # no weights, to torchvision
        share = torch.ones_like(share)
    z = sign * scores
    missing = torch.sigmoid(-z)
    slope = missing + gamma * torch.sigmoid(z) * functional.softplus(-z)
    grad_input.copy_(-sign * share * missing**gamma * slope)


# --- The module ---------------------------------------------------------------------------------------------


def refuse(operator: str, *_: Any, **__: Any) -> NoReturn:
    """Called in place of operators that are not in COVERED."""
    raise NotImplementedError(
        f"{operator}: torchvision has no replacement for this operator of mmcv; "
        "choose a method without it, or compile mmcv 2.1.0 in place of mmcv-lite"
    )


def _no_version() -> str:
    return "not compiled; torchvision's operators"


OPERATORS: tuple[Callable[..., Any], ...] = (
    *(nms, softnms, roi_align_forward, roi_align_backward),
    *(deform_conv_forward, deform_conv_backward_input, deform_conv_backward_parameters),
    *(modulated_deform_conv_forward, modulated_deform_conv_backward),
    *(sigmoid_focal_loss_forward, sigmoid_focal_loss_backward),
)
COVERED = {function.__name__: function for function in OPERATORS}
COVERED |= dict.fromkeys(("get_compiler_version", "get_compiling_cuda_version"), _no_version)


class BridgedOperators(ModuleType):
    """Any name is an operator, of COVERED or one that raises NotImplementedError."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(f"{self.__name__} has no {name}")
        return COVERED.get(name, partial(refuse, name))


def install() -> bool:
    """Put the replacement into `sys.modules`, unless mmcv has the module; returns whether it did.

    Raises:
        ImportError: mmcv is not installed.
    """
    try:
        present = NAME in sys.modules or find_spec(NAME) is not None
    except ModuleNotFoundError as error:
        raise ImportError(f"mmcv is not installed ({error}): run `make setup-openmmlab`") from error
    if not present:
        module = BridgedOperators(NAME, __doc__)
        module.__spec__ = ModuleSpec(NAME, None)
        sys.modules[NAME] = module
    return not present


install()
