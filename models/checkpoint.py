"""Read checkpoints safely, and load them completely or not at all.

Files of the original release, of this codebase and of common tools (timm, mmdet, mmseg, Lightning) are read.
Parameters keep the original's names. Tables that follow from the options are skipped; Focal-fast's choice of
nearest keys is loaded. A checkpoint fits models of its own window size, focal windows, input size and input
channels; with `resize` it is adapted to others (resize.py).
"""

from __future__ import annotations

import hashlib
import logging
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from .focal_transformer import FROM_OPTIONS, FocalFastAttention
from .resize import depends_on_setting, is_plain, is_ring, resize_state, stale_stored_keys
from .safetensors_file import read_safetensors
from .torch_file import read_torch_file, shown

logger = logging.getLogger(__name__)

DERIVED_BUFFERS = re.compile(rf"\.attn\.({'|'.join(FROM_OPTIONS)})")
"""Tables in the original's files that follow from the options."""

STORED_KEYS = re.compile(r"\.attn\.topk_cloest_indice_\d+$")
"""Focal-fast's choice of nearest keys, valid for the map size it was made for."""

HEAD = ("head.weight", "head.bias")
STATE_KEYS = ("model", "state_dict", "model_state_dict")
"""Where a file may hold its parameters; else the file is the state dict itself."""

STEM = "patch_embed.proj.weight"
"""The first convolution, [C, in_chans, k, k]; every file of weights has one."""

TIMEOUT_SECONDS = 60  # of a download, without a byte
RGB = 3
PREFIXES = re.compile(r"(?:(?:module|_orig_mod|model|backbone|encoder)\.)*")
"""What wrappers and larger models put before the names of this one."""

WRAPPERS = re.compile(r"(?:module|_orig_mod)\.")
"""The prefixes of DataParallel, DistributedDataParallel and torch.compile."""

GENERAL_ADVICE = "Use the config that the checkpoint was trained with, and an undamaged copy."
SHOWN_KEYS = 12


@dataclass
class LoadReport:
    """What `load_checkpoint` did with keys that it did not simply load."""

    path: str
    reset: list[str] = field(default_factory=list)  # head parameters left at their fresh values, or dropped
    classes: list[str] = field(default_factory=list)  # of a class map, the indices of new classes left fresh
    recomputed: list[str] = field(default_factory=list)  # stored keys chosen for another map size
    resized: list[str] = field(default_factory=list)  # parameters of another window or input size
    continued: list[str] = field(default_factory=list)  # rings that the file lacks, made of its own windows
    dropped: list[str] = field(default_factory=list)  # rings that the model lacks
    adapted: list[str] = field(default_factory=list)  # the first convolution, of other input channels
    left_out: list[str] = field(default_factory=list)  # of a larger model, what is not this one's


def read_checkpoint(path_or_url: str | Path) -> dict[str, Any]:
    """Read a checkpoint file to the CPU without executing anything in it.

    Args:
        path_or_url: a file of torch.save or a `.safetensors` file, or an http(s) address of one, which is
            downloaded once, into the cache of torch.hub.

    Raises:
        OSError: no such file, or it cannot be read, or does not fit into memory.
        ValueError: not a checkpoint, damaged, a file that would execute code, or it cannot be downloaded.
    """
    is_address = str(path_or_url).lower().startswith(("http://", "https://"))
    path = _downloaded(str(path_or_url)) if is_address else Path(path_or_url).expanduser()
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no plain file" if path.exists() else "not there"
        raise FileNotFoundError(f"{path}: expected a checkpoint file, but it is {kind}; check the path")
    try:
        return read_safetensors(path) if path.suffix == ".safetensors" else read_torch_file(path)
    except ValueError as error:
        if not is_address:
            raise
        path.unlink(missing_ok=True)  # it may have ended too early
        raise ValueError(f"{path_or_url}, downloaded to {error}. The download is removed") from error


def _downloaded(url: str) -> Path:
    """The file of an address, in the cache of torch.hub; many addresses end in the same name."""
    name, digest = Path(urlparse(url).path), hashlib.sha256(url.encode()).hexdigest()[:8]
    path = Path(torch.hub.get_dir(), "checkpoints", f"{name.stem}-{digest}{name.suffix}")
    before = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(TIMEOUT_SECONDS)  # torch.hub would wait for a silent server for ever
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=False)
    except (OSError, HTTPException, ValueError) as error:
        raise ValueError(
            f"{url}: could not be downloaded ({shown(error)}); pass a local file instead"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    return path


def state_dict_of(checkpoint: Mapping[str, Any], origin: str = "checkpoint") -> dict[str, Tensor]:
    """The parameters in what `read_checkpoint` returned, under today's names.

    Prefixes of wrappers (module., _orig_mod.) and of larger models (backbone., encoder., model.) are removed,
    in any order. What a larger model has beside this one is left out, and logged.

    Raises:
        ValueError: there are none, an entry is no tensor, or a name is none or occurs twice.
    """
    state, left_out = _own_state(checkpoint, origin)
    _log(LoadReport(origin, left_out=left_out))
    return state


def _own_state(checkpoint: Mapping[str, Any], origin: str) -> tuple[dict[str, Tensor], list[str]]:
    """`state_dict_of`, and the names that it leaves out."""
    state = next(
        (checkpoint[key] for key in STATE_KEYS if isinstance(checkpoint.get(key), Mapping)), checkpoint
    )
    not_tensors = [
        key for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if not_tensors or not state:
        raise ValueError(
            f"{origin}: expected a state dict, bare or under one of {', '.join(STATE_KEYS)}; found "
            f"{'no entries' if not state else 'entries that are no tensors: ' + _listed(not_tensors)}"
        )
    own, left_out = _without_prefixes(state, origin)
    return {key: value for key, value in own.items() if not DERIVED_BUFFERS.search(key)}, left_out


def _without_prefixes(state: Mapping[str, Tensor], origin: str) -> tuple[dict[str, Tensor], list[str]]:
    """The entries beside the first convolution, under bare names, and the names of all others.

    {module.backbone.patch_embed.proj.weight: a, module.neck.weight: b} -> {patch_embed.proj.weight: a},
    [neck.weight]. Without prefix, nothing is left out: what else is there is unexpected.
    """
    places: dict[str, dict[str, Tensor]] = {}  # prefix without wrappers -> bare name -> entry
    twice: set[str] = set()
    for key, value in state.items():
        name = PREFIXES.sub("", key, count=1)
        place = places.setdefault(WRAPPERS.sub("", key.removesuffix(name)), {})
        twice |= {name} & place.keys()
        place[name] = value
    homes = [place for place, entries in places.items() if STEM in entries]
    home = homes[0] if homes else "" if len(places) > 1 else next(iter(places))
    own = places.pop(home, {})
    rest = {place + name: value for place, entries in places.items() for name, value in entries.items()}
    twice |= own.keys() & rest.keys() | ({STEM} if len(homes) > 1 else set())
    if twice:
        raise ValueError(
            f"{origin}: expected every name once, found these with different prefixes or with and without "
            f"one: {_listed(sorted(twice))}"
        )
    removed = sorted({key.removesuffix(PREFIXES.sub("", key, count=1)) for key in state} - {""})
    if removed:
        logger.info("%s: the prefix %s is removed from the names", origin, " and ".join(removed))
    return (own, sorted(rest)) if home else (own | rest, [])


def read_class_map(path: str | Path, num_classes: int) -> list[int | None]:
    """Which class of an older classifier each class of a new one continues; None for one that starts afresh.

    Args:
        path: text of one line per new class: the index of the older class, counted from 0, or `-` (or -1).
            Several classes may continue the same one.
        num_classes: of the new classifier.

    Raises:
        FileNotFoundError: no such file.
        ValueError: other lines, or another number of them.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"{path}: expected a class map, but there is no such file; check the path")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a text file that can be read, got: {shown(error)}") from error
    lines = [line.strip() for line in text.rstrip().splitlines()]
    for number, line in enumerate(lines, start=1):
        if not re.fullmatch(r"-1?|[0-9]{1,9}", line, re.ASCII):
            raise ValueError(
                f"{path}, line {number}: expected the index of a class in the older classifier, or - for a "
                f"class that it lacks, got {shown(line)!r}; correct the line"
            )
    if len(lines) != num_classes:
        raise ValueError(
            f"{path}: expected {num_classes} lines, one for each class (MODEL.NUM_CLASSES), got {len(lines)}"
        )
    return [None if line.startswith("-") else int(line) for line in lines]


def load_checkpoint(
    model: nn.Module,
    path_or_url: str | Path,
    reset_head: bool = False,
    resize: bool = False,
    class_map: Sequence[int | None] | None = None,
) -> LoadReport:
    """Load all parameters of a model from an original or own checkpoint, or change nothing.

    Args:
        model: a FocalTransformer, on any device; also inside torch.compile, DataParallel or
            DistributedDataParallel.
        path_or_url: see `read_checkpoint`.
        reset_head: leave the classifier as it is (another set of classes, or a backbone without one).
        resize: fit what depends on window, focal windows, ring and input size to those of the model, and the
            first convolution from 3 input channels to other numbers.
        class_map: for each class of the model, which class of the file's classifier it continues; None for
            one that stays fresh (`read_class_map`). Not together with reset_head.

    Returns:
        What was not simply loaded; it is logged, too.

    Raises:
        OSError: no such file, or it cannot be read, or does not fit into memory.
        ValueError: no checkpoint, or damaged, or keys that are missing, unexpected, mis-shaped, of another
            kind or not finite, all listed.
    """
    model = _unwrapped(model)
    given, left_out = _own_state(read_checkpoint(path_or_url), str(path_or_url))
    wanted = model.state_dict()
    report = LoadReport(str(path_or_url), left_out=left_out)
    if reset_head:
        report.reset = sorted(key for key in HEAD if key in given or key in wanted)
        given = {key: value for key, value in given.items() if key not in HEAD}
        wanted = {key: value for key, value in wanted.items() if key not in HEAD}
    if class_map is not None:
        report.classes = [str(i) for i, old in enumerate(class_map) if old is None]
        given |= _mapped_head(given, wanted, class_map, report.path)
    elsewhere = [key for key in given if STORED_KEYS.search(key) and _differ_in_shape(given, wanted, key)]
    if resize:
        report.adapted = _adapt_stem(given, wanted)
        map_size = getattr(model, "train_resolution", None)
        report.resized, report.continued, report.dropped = resize_state(given, wanted, map_size)
        elsewhere += [key for key in stale_stored_keys(model, given) if key not in elsewhere]
    for key in elsewhere:
        report.recomputed.append(key)
        del given[key], wanted[key]
    check_state(given, wanted, report.path)
    for name, layer in model.named_modules():
        if isinstance(layer, FocalFastAttention):
            _check_stored_keys(layer, name, given, report.path)
    model.load_state_dict(given, strict=False)  # complete but for what the report says
    _log(report)
    return report


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DataParallel and DistributedDataParallel."""
    while (inner := model._modules.get("_orig_mod", model._modules.get("module"))) is not None:
        model = inner
    return model


def _adapt_stem(given: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Fit a first convolution of 3 input channels to the model's number, as timm does; what was changed."""
    old, new = given.get(STEM), wanted.get(STEM)
    if old is None or new is None or not (_is_weight(old) and _differs_in_channels(old, new)):
        return []
    if old.shape[1] != RGB:
        return []
    given[STEM] = adapt_input_conv(new.shape[1], old)
    return [STEM]


def _differs_in_channels(old: Tensor, new: Tensor) -> bool:
    """Whether two kernels [C, in_chans, k, k] differ in in_chans alone."""
    if not old.ndim == new.ndim == 4:
        return False
    others = [(x.shape[0], x.shape[2:]) for x in (old, new)]
    return others[0] == others[1] and old.shape[1] != new.shape[1]


def _mapped_head(
    given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], class_map: Sequence[int | None], origin: str
) -> dict[str, Tensor]:
    """The wanted classifier, with the rows of the given one where the map names some."""
    heads = [(given.get(key), wanted.get(key)) for key in HEAD]
    if not all(new is not None and old is not None and _is_weight(old) for old, new in heads):
        raise ValueError(
            f"{origin}: expected a classifier to take classes from, got none; drop the class map"
        )
    count = min(len(given[key]) for key in HEAD)
    old_of = {new: old for new, old in enumerate(class_map) if old is not None}
    wrong = [f"{new} (line {new + 1}) -> {old}" for new, old in old_of.items() if not 0 <= old < count]
    if wrong:
        raise ValueError(
            f"{origin}: has classes 0 to {count - 1}, but the class map names others: {_listed(wrong)}; "
            "correct the map, or use the weights it was made for"
        )
    classes = len(wanted[HEAD[0]])
    if len(class_map) != classes:
        raise ValueError(f"expected a class map of {classes} entries, one per class, got {len(class_map)}")
    mapped = {}
    for key in HEAD:
        old, new = given[key], wanted[key].clone()
        if old.shape[1:] == new.shape[1:]:  # else the comparison with the model will tell
            new[list(old_of)] = old[list(old_of.values())].to(new)
            mapped[key] = new
    return mapped


def _is_weight(tensor: Tensor) -> bool:
    return is_plain(tensor) and tensor.is_floating_point() and tensor.ndim > 0


def _differ_in_shape(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], key: str) -> bool:
    """Whether both have the key, in different shapes."""
    return key in given and key in wanted and given[key].shape != wanted[key].shape


def _log(report: LoadReport) -> None:
    """Say what was not simply loaded."""
    for level, names, text in (
        (logging.WARNING, report.reset, "the classifier is not loaded (reset_head)"),
        (logging.WARNING, report.classes, "the class map leaves new classes fresh"),
        (logging.WARNING, report.continued, "rings that it lacks are continued from its own windows' tables"),
        (logging.WARNING, report.dropped, "rings that the model lacks are dropped"),
        (logging.WARNING, report.left_out, "parts of a larger model are left out"),
        (logging.WARNING, report.adapted, "made for 3 input channels, adapted to the model's number"),
        (logging.INFO, report.resized, "made for other windows or another input size, resized"),
        (logging.INFO, report.recomputed, "made for another input size; nearest keys are chosen anew in"),
    ):
        if names:
            logger.log(level, "%s: %s: %d: %s", report.path, text, len(names), _listed(names))


def check_state(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], origin: str) -> None:
    """Raise ValueError listing all differences between two state dicts."""
    missing, unexpected = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    common = sorted(given.keys() & wanted.keys())
    unlike = [key for key in common if _differ_in_shape(given, wanted, key)]
    shapes = [f"{key} is {list(given[key].shape)}, expected {list(wanted[key].shape)}" for key in unlike]
    kinds = [
        f"{key} is {_kind(given[key])}, expected {_kind(wanted[key])}"
        for key in common
        if not is_plain(given[key]) or given[key].is_floating_point() != wanted[key].is_floating_point()
    ]
    broken = []
    if not (missing or unexpected or shapes or kinds):
        broken = [key for key in common if not torch.isfinite(given[key].to(wanted[key].dtype)).all()]
    problems = [
        f"{len(names)} {what}: {_listed(names)}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
            ("of another kind", kinds),
            ("with nan or inf", broken),
        )
        if names
    ]
    if not problems:
        return
    advice = GENERAL_ADVICE if kinds else _advice(given, wanted, [*missing, *unexpected], unlike)
    raise ValueError(
        f"{origin} does not fit the model; nothing was loaded. {advice}\n  " + "\n  ".join(problems)
    )


def _advice(
    given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], on_one_side: list[str], unlike: list[str]
) -> str:
    """What to do about keys that only one of two state dicts has, and those of unlike shapes.

    Rings come and go with the input size; other tables only change their shape with it.
    """
    names = [*on_one_side, *unlike]
    head = [key for key in names if key in HEAD]
    setting = [key for key in on_one_side if is_ring(key)]
    setting += [key for key in unlike if depends_on_setting(key)]
    stem = [key for key in unlike if key == STEM and _differs_in_channels(given[key], wanted[key])]
    if not names or len(head) + len(setting) + len(stem) < len(names):
        return GENERAL_ADVICE
    remedies = {}
    if head:
        remedies["the classifier"] = (
            "set MODEL.NUM_CLASSES, or ask for a new head (reset_head; training with MODEL.RESET_HEAD True)"
        )
    if setting:
        remedies["what depends on windows or the input size"] = (
            "set windows and input size as they were, or have the checkpoint resized (resize; training with "
            "--pretrained does)"
        )
    if stem:
        channels = given[STEM].shape[1]
        adapt = f"use weights of {RGB} channels, which can be adapted (resize)"
        if channels == RGB:
            adapt = "have the first convolution adapted (resize; training with --pretrained does)"
        remedies["the number of input channels"] = (
            f"set MODEL.FOCAL.IN_CHANS (in_chans) to {channels}, or {adapt}"
        )
    differ = "differs" if len(remedies) == 1 else "differ"
    return f"Only {' and '.join(remedies)} {differ}: {'; '.join(remedies.values())}."


def _check_stored_keys(
    layer: FocalFastAttention, name: str, given: Mapping[str, Tensor], origin: str
) -> None:
    """Raise ValueError where the file's choice of nearest keys names tokens that do not exist."""
    choice = [given.get(f"{name}.{key}", getattr(layer, key)) for key in layer.key_buffers]
    try:
        layer.check_stored_keys(choice)
    except ValueError as error:
        raise ValueError(f"{origin}: {name}: {error}; nothing was loaded") from error


def _kind(tensor: Tensor) -> str:
    layout = "" if tensor.layout == torch.strided else f" {tensor.layout}"
    return f"{tensor.dtype}{layout}{' without values' if tensor.is_meta else ''}"


def _listed(names: list[Any]) -> str:
    more = f", ... ({len(names) - SHOWN_KEYS} more)" if len(names) > SHOWN_KEYS else ""
    return ", ".join(shown(name) for name in names[:SHOWN_KEYS]) + more
