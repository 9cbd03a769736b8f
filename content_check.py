"""What the parts of a training checkpoint have to look like, checked before anything is taken from them.

Tensors are read as plain data (models/checkpoint.py), so a file from elsewhere runs no code; but it may hold
text where a number belongs. What is needed to go on is checked here, one message for the first mistake.
"""

import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

MOST = 2**53  # counters; the largest up to which a float64 holds every integer
MOST_PROCESSES = 2**20

Check = tuple[str, Callable[[Any], bool]]  # (what is expected, whether it is so)


def check_content(content: Mapping[str, Any], origin: str) -> None:
    """Check the parts that ``TrainState.load`` takes; those that older files lack may be missing.

    Args:
        content: of the file.
        origin: of the content, for the message.

    Raises:
        ValueError: the first part that is not what it should be, and what it should be.
    """
    for name, (expected, holds) in PARTS.items():
        if name in content and not holds(content[name]):
            raise ValueError(
                f"{origin}: expected {name} to be {expected}, got {reprlib.repr(content[name])}; the file is "
                "damaged, or not of this project: go on from another one, or use --pretrained"
            )


def is_number(value: Any) -> bool:
    """Whether a value is finite and no larger than anything that is counted here."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MOST


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and is_number(value) and value >= 0


def _is_dict_of(value: Any, parts: Mapping[str, Callable[[Any], bool]]) -> bool:
    """Whether a value has exactly these keys, with such values."""
    return (
        isinstance(value, Mapping)
        and value.keys() == parts.keys()
        and all(holds(value[name]) for name, holds in parts.items())
    )


def _is_list_of(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and all(map(holds, value))


def _are_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in value.items()
    )


def _is_position(value: Any) -> bool:
    newer = {"dealt": [], "order": ""}  # missing in the first format
    parts = {
        **dict.fromkeys(("epoch", "step", "updates"), _is_count),
        "dealt": lambda dealt: _is_list_of(dealt, _is_deal),
        "order": lambda order: isinstance(order, str),
    }
    return isinstance(value, Mapping) and _is_dict_of({**newer, **value}, parts)


def _is_deal(value: Any) -> bool:
    """A pair of processes and images, see ``Position.dealt``."""
    return _is_list_of(value, _is_count) and len(value) == 2 and 1 <= value[0] <= MOST_PROCESSES


def _is_optimizer(value: Any) -> bool:
    return _is_dict_of(
        value,
        {
            "state": lambda state: (
                isinstance(state, Mapping)
                and all(_is_count(index) and isinstance(held, Mapping) for index, held in state.items())
                and len({frozenset(held) for held in state.values()}) <= 1  # one kind of moments
            ),
            "param_groups": lambda groups: _is_list_of(
                groups,
                lambda group: isinstance(group, Mapping) and _is_list_of(group.get("params"), _is_count),
            ),
        },
    )


def _is_scaler(value: Any) -> bool:
    parts: dict[str, Callable[[Any], bool]] = dict.fromkeys(
        ("scale", "growth_factor", "backoff_factor"), lambda factor: is_number(factor) and factor > 0
    )
    parts |= dict.fromkeys(("growth_interval", "_growth_tracker"), _is_count)
    return value == {} or _is_dict_of(value, parts)


def _is_row_of_steps(value: Any) -> bool:
    """Float64 (processes, steps, 5), see ``TrainMeter``."""
    return torch.is_tensor(value) and value.dtype == torch.float64 and value.ndim == 3 and value.shape[2] == 5


def _is_bad_step(value: Any) -> bool:
    parts = {"step": _is_count, "number": _is_count, "grad_norm": _is_float}
    return _is_dict_of(value, {**parts, "losses": _are_losses})


def _are_losses(value: Any) -> bool:
    """A list per batch, of one loss per process."""
    return _is_list_of(value, lambda batch: _is_list_of(batch, _is_float))


def _is_float(value: Any) -> bool:
    """Any number, nan and inf too."""
    return is_number(value) or (isinstance(value, float) and not math.isfinite(value))


def _is_meters(value: Any) -> bool:
    parts: dict[str, Callable[[Any], bool]] = dict.fromkeys(
        ("loss_sum", "image_sum", "seconds", "interval_seconds"), is_number
    )
    parts |= {
        "replaced": _is_count,
        "gathered": lambda rows: _is_list_of(rows, _is_row_of_steps),
        "streak": lambda streak: _is_list_of(streak, _is_bad_step),
        "unmade": _are_losses,
    }
    return isinstance(value, Mapping) and _is_dict_of({"unmade": [], **value}, parts)


COUNT: Check = (f"an integer from 0 to {MOST}", _is_count)
TENSORS: Check = ("a dict of tensors", _are_tensors)

PARTS: dict[str, Check] = {
    "model": TENSORS,
    "model_ema": TENSORS,
    "optimizer": ("the state of a torch optimizer", _is_optimizer),
    "scaler": ("the state of a gradient scaler, or {}", _is_scaler),
    "position": (
        "a dict of epoch, step, updates (integers), dealt (pairs of integers) and order (text)",
        _is_position,
    ),
    "meters": ("the sums and steps of an epoch", _is_meters),
    "max_accuracy": ("a number", is_number),
    "evaluated": ("True or False", lambda value: isinstance(value, bool)),
    "run": COUNT,
    "metrics_size": COUNT,
    "config": ("yaml text", lambda value: isinstance(value, str)),
}
