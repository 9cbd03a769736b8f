"""Checkpoints: the original release's and ours, read safely and completely or not at all.

Parameters carry the original's names, so its files need no renaming. What they hold beside parameters are
index tables: those that follow from the options are dropped, Focal-fast's choice of nearest keys is loaded.
Tables are not resized: a checkpoint fits models of its own window size and focal windows only.

Files are always read with `weights_only=True`. The original pickled its yacs config into training
checkpoints; that one class is read as a plain dict, any other code in a file is refused.
"""

from __future__ import annotations

import logging
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from .focal_attention import FocalAttention
from .key_selection import NearestKeys

logger = logging.getLogger(__name__)

DERIVED_BUFFERS = re.compile(
    r"\.attn\.(relative_position_index(_\d+)?|valid_ind_rolled|valid_ind_unfold_\d+|window_coords|topk_cloest_coords_\d+)$"
)
"""Tables in the original's files that follow from the options."""

CHOICE_BUFFERS = re.compile(r"\.attn\.topk_cloest_indice_\d+$")
"""Focal-fast's choice of nearest keys, valid for the map size it was made for."""

HEAD = ("head.weight", "head.bias")
STATE_KEYS = ("model", "state_dict", "model_state_dict")
"""Where a file may hold its parameters; else the file is the state dict itself."""

SHOWN_KEYS = 12


@dataclass
class LoadReport:
    """What `load_checkpoint` did with keys that it did not simply load."""

    path: str
    reset: list[str] = field(default_factory=list)  # head parameters left at their fresh values, or dropped
    recomputed: list[str] = field(default_factory=list)  # stored choices made for another map size


def read_checkpoint(path_or_url: str | Path) -> dict[str, Any]:
    """Read a checkpoint file to the CPU without executing anything in it.

    Args:
        path_or_url: a file, or an http(s) address, which is kept in the torch hub cache.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint, damaged, or a file that would execute code.
    """
    path = _local_file(path_or_url)
    try:
        with torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode")]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if any(word in str(error) for word in ("Unsupported", "GLOBAL", "Can only")):
            raise ValueError(
                f"{path}: refused, because reading it would execute code. A checkpoint may hold tensors, "
                "numbers, text, lists and dicts; save it again without the rest"
            ) from error
        raise ValueError(f"{path}: not a checkpoint, or damaged; get it again") from error
    except (RuntimeError, EOFError, LookupError, ValueError, OSError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: not a checkpoint, or damaged; get it again") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a dict of tensors, found {type(content).__name__}")
    return dict(content)


def state_dict_of(checkpoint: Mapping[str, Any], origin: str = "checkpoint") -> dict[str, Tensor]:
    """The parameters in what `read_checkpoint` returned, under today's names.

    Raises:
        ValueError: there are none, or an entry is no tensor.
    """
    state = next(
        (checkpoint[key] for key in STATE_KEYS if isinstance(checkpoint.get(key), Mapping)), checkpoint
    )
    state = {str(key).removeprefix("module."): value for key, value in state.items()}
    not_tensors = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if not_tensors or not state:
        raise ValueError(
            f"{origin}: expected a state dict, bare or under one of {', '.join(STATE_KEYS)}; found "
            f"{'no entries' if not state else 'entries that are no tensors: ' + _listed(not_tensors)}"
        )
    return {key: value for key, value in state.items() if not DERIVED_BUFFERS.search(key)}


def load_checkpoint(model: nn.Module, path_or_url: str | Path, reset_head: bool = False) -> LoadReport:
    """Load all parameters of a model from an original or own checkpoint, or change nothing.

    Args:
        model: a FocalTransformer, on any device.
        path_or_url: see `read_checkpoint`.
        reset_head: leave the classifier as it is (another set of classes, or a backbone without one).

    Returns:
        What was not simply loaded; it is logged, too.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable, or keys that are missing, unexpected, mis-shaped or of another kind, all
            listed.
    """
    given = state_dict_of(read_checkpoint(path_or_url), str(path_or_url))
    wanted = model.state_dict()
    report = LoadReport(str(path_or_url))
    if reset_head:
        report.reset = sorted(key for key in HEAD if key in given or key in wanted)
        given = {key: value for key, value in given.items() if key not in HEAD}
        wanted = {key: value for key, value in wanted.items() if key not in HEAD}
    for key in [key for key in given if CHOICE_BUFFERS.search(key)]:
        if key in wanted and given[key].shape != wanted[key].shape:
            report.recomputed.append(key)
            del given[key], wanted[key]
    check_state(given, wanted, report.path)
    for name, layer in model.named_modules():
        if isinstance(layer, FocalAttention) and isinstance(layer.selection, NearestKeys):
            _check_choice(layer, layer.selection, name, given, report.path)
    model.load_state_dict(given, strict=False)  # complete but for what the report says
    if report.reset:
        logger.warning(
            "%s: the classifier is not loaded (reset_head): %s", report.path, ", ".join(report.reset)
        )
    if report.recomputed:
        logger.info(
            "%s: made for another input size; nearest keys are chosen anew in %d tables",
            report.path,
            len(report.recomputed),
        )
    return report


def check_state(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], origin: str) -> None:
    """Raise ValueError listing all differences between two state dicts."""
    problems = []
    missing, unexpected = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    if missing:
        problems.append(f"{len(missing)} missing: {_listed(missing)}")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected: {_listed(unexpected)}")
    common = sorted(given.keys() & wanted.keys())
    shapes = [
        f"{key} is {list(given[key].shape)}, expected {list(wanted[key].shape)}"
        for key in common
        if given[key].shape != wanted[key].shape
    ]
    if shapes:
        problems.append(f"{len(shapes)} of another shape: {_listed(shapes)}")
    kinds = [
        f"{key} is {given[key].dtype}, expected {wanted[key].dtype}"
        for key in common
        if given[key].is_floating_point() != wanted[key].is_floating_point() or given[key].is_complex()
    ]
    if kinds:
        problems.append(f"{len(kinds)} of another kind: {_listed(kinds)}")
    if not problems:
        return
    advice = "Use the config that the checkpoint was trained with."
    if (
        all(key in HEAD for key in missing + unexpected)
        and all(text.split()[0] in HEAD for text in shapes)
        and not kinds
    ):
        advice = "Only the classifier differs: set MODEL.NUM_CLASSES, or ask for a new head (reset_head)."
    raise ValueError(
        f"{origin} does not fit the model; nothing was loaded. {advice}\n  " + "\n  ".join(problems)
    )


def _check_choice(
    layer: FocalAttention, selection: NearestKeys, name: str, given: Mapping[str, Tensor], origin: str
) -> None:
    """Raise ValueError where the file's choice of nearest keys cannot be."""
    choice = [given.get(f"{name}.{key}", own) for key, own in layer.named_buffers(recurse=False)]
    try:
        selection.check_choice(choice)
    except ValueError as error:
        raise ValueError(f"{origin}: {name}: {error}; nothing was loaded") from error


def _listed(names: list[str]) -> str:
    more = f", ... ({len(names) - SHOWN_KEYS} more)" if len(names) > SHOWN_KEYS else ""
    return ", ".join(names[:SHOWN_KEYS]) + more


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _local_file(path_or_url: str | Path) -> Path:
    """The file itself, fetched first where it is an address."""
    address = urlparse(str(path_or_url))
    if address.scheme in ("http", "https"):
        return _download(str(path_or_url), Path(address.path).name)
    path = Path(path_or_url).expanduser()
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "not there"
        raise FileNotFoundError(f"{path}: expected a checkpoint file, but it is {kind}; check the path")
    return path


def _download(url: str, name: str) -> Path:
    """Fetch to the torch hub cache, unless it is there."""
    target = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(target), progress=False)
        except OSError as error:
            raise ValueError(
                f"{url}: could not be fetched ({_first_line(error)}); pass a local file instead"
            ) from error
    return target
