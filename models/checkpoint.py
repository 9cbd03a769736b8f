"""Read checkpoints safely, and load them completely or not at all.

Files of the original release, of this codebase and of common tools (timm, mmdet, mmseg, Lightning) are read.
Parameters keep the original's names. Tables that follow from the options are skipped. Focal-fast's choice of
nearest keys is loaded where it holds for the model's input size; elsewhere the model's own stays. A
checkpoint fits models of its own windows, position embedding and input channels; with `resize` it is adapted
to others (resize.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from filelock import FileLock
from timm.models import adapt_input_conv
from torch import Tensor, nn

from .focal_transformer import ORIGINAL_BUFFERS, FocalFastAttention, whole_numbers
from .resize import is_plain, resize_state
from .safetensors_file import read_safetensors
from .torch_file import read_torch_file, shown

logger = logging.getLogger(__name__)

DERIVED_BUFFERS = re.compile(rf"\.attn\.({'|'.join(ORIGINAL_BUFFERS)})|\.attn_mask$")
"""Tables in the original's files that follow from the options."""

STORED_KEYS = re.compile(r"\.attn\.topk_cloest_indice_\d+$")
"""Focal-fast's choice of nearest keys, valid for the map size it was made for."""

HEAD = ("head.weight", "head.bias")
STATE_KEYS = ("model", "state_dict", "model_state_dict", "module")
"""Where a file may hold its parameters, the last in DeepSpeed's; else the file is the state dict itself."""

AVERAGES = ("model_ema", "state_dict_ema")
"""Where a file may hold averaged weights beside them. MMEngine's EMAHook puts them under `state_dict`."""

STEM = "patch_embed.proj.weight"
"""The first convolution, [C, in_chans, k, k]; every file of weights has one."""

TIMEOUT_SECONDS = 60  # of a download, without a byte
LOCK_SECONDS = 3600  # to wait for another process that downloads
RGB = 3
PREFIXES = re.compile(r"(?:(?:module|_orig_mod|model|net|timm_model|_?backbone|encoder)\.)*")
"""What wrappers and larger models put before the names of this one."""

WRAPPERS = re.compile(r"(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
"""What wrappers of a block or stage put into names, anywhere."""

ADVICE = (
    "Use an undamaged copy, and the config that the checkpoint was trained with: MODEL.NUM_CLASSES, "
    "MODEL.FOCAL.IN_CHANS, windows and input size. Or adapt the checkpoint: training with --pretrained "
    f"(resize) fits other windows, another input size, and {RGB} input channels to another number; "
    "MODEL.RESET_HEAD True (reset_head) starts a new classifier."
)
SHOWN_KEYS = 12


@dataclass
class LoadReport:
    """What `load_checkpoint` did with keys that it did not simply load."""

    path: str
    reset: list[str] = field(default_factory=list)  # head parameters left at their fresh values, or dropped
    kept: list[str] = field(default_factory=list)  # the model's own choice: the file's are not the nearest
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
    """The file of an address, in the cache of torch.hub; many addresses end in the same name.

    One process downloads it (torch.hub renames the file when it is complete), others of the machine wait.
    """
    name, digest = Path(urlparse(url).path), hashlib.sha256(url.encode()).hexdigest()[:8]
    path = Path(torch.hub.get_dir(), "checkpoints", f"{name.stem}-{digest}{name.suffix}")
    before = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(TIMEOUT_SECONDS)  # torch.hub would wait for a silent server for ever
        if not path.exists():  # the cache of a cluster may be read-only
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as stack:
                with contextlib.suppress(OSError, NotImplementedError):  # of file systems without locks
                    lock = path.with_name(f".{path.name}.lock")
                    stack.enter_context(FileLock(lock, LOCK_SECONDS, fallback_to_soft=False))
                if not path.exists():
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

    Prefixes of wrappers (module., _orig_mod., timm_model., ...) and of larger models (backbone., encoder.,
    net., ...) are removed, in any order. What a larger model has beside this one is left out, and logged.

    Raises:
        ValueError: there are none, or those of several models, or an entry is no tensor.
    """
    state, left_out = _own_state(checkpoint, origin)
    _log(LoadReport(origin, left_out=left_out))
    return state


def usual_weights(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where the parameters are in what `read_checkpoint` returned, not yet checked."""
    groups = (checkpoint.get(key) for key in STATE_KEYS)
    return next((group for group in groups if isinstance(group, Mapping)), checkpoint)


def _own_state(checkpoint: Mapping[str, Any], origin: str) -> tuple[dict[str, Tensor], list[str]]:
    """`state_dict_of`, and the names that it leaves out."""
    state = usual_weights(checkpoint)
    not_tensors = [
        key for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if not_tensors or not state:
        raise ValueError(
            f"{origin}: expected a state dict, bare or under one of {', '.join(STATE_KEYS)}; found "
            f"{'no entries' if not state else 'entries that are no tensors: ' + _listed(not_tensors)}"
        )
    for key in AVERAGES:
        average = checkpoint.get(key)
        if isinstance(average, Mapping) and any(isinstance(value, Tensor) for value in average.values()):
            logger.warning(
                f"{origin}: its averaged weights are not used; python -m tools.convert_checkpoint --weights "
                f"{key} writes them to a file of their own"
            )
    own, left_out = _without_prefix(state, origin)
    return {
        key: whole_numbers(value) if STORED_KEYS.search(key) else value
        for key, value in own.items()
        if not DERIVED_BUFFERS.search(key)
    }, left_out


def _without_prefix(state: Mapping[str, Tensor], origin: str) -> tuple[dict[str, Tensor], list[str]]:
    """The entries that have the prefix of the first convolution, without it, and the names of all others.

    {module.backbone.patch_embed.proj.weight: a, module.neck.weight: b} -> {patch_embed.proj.weight: a},
    [module.neck.weight].
    """
    stems = [key for key in state if PREFIXES.sub("", key, count=1) == STEM]
    if len(stems) > 1:
        raise ValueError(f"{origin}: expected the weights of one model, found several: {_listed(stems)}")
    prefix = stems[0].removesuffix(STEM) if stems else ""
    if prefix:
        logger.info("%s: the prefix %s is removed from the names", origin, prefix)
    own = {
        WRAPPERS.sub("", key.removeprefix(prefix)): value
        for key, value in state.items()
        if key.startswith(prefix)
    }
    return own, sorted(key for key in state if not key.startswith(prefix))


def load_checkpoint(
    model: nn.Module, path_or_url: str | Path, reset_head: bool = False, resize: bool = False
) -> LoadReport:
    """Load all parameters of a model from an original or own checkpoint, or change nothing.

    Args:
        model: a FocalTransformer, on any device; also inside torch.compile, DataParallel or
            DistributedDataParallel.
        path_or_url: see `read_checkpoint`.
        reset_head: leave the classifier as it is (another set of classes, or a backbone without one).
        resize: fit what depends on window, focal windows, ring and input size to those of the model, and the
            first convolution from 3 input channels to other numbers.

    Returns:
        What was not simply loaded; it is logged, too.

    Raises:
        OSError: no such file, or it cannot be read, or does not fit into memory.
        ValueError: no checkpoint, or damaged, or keys that are missing, unexpected, mis-shaped, of another
            kind or not finite, all listed.
    """
    model = _unwrapped(model)
    given, left_out = _own_state(read_checkpoint(path_or_url), str(path_or_url))
    wanted: dict[str, Tensor] = {}
    names: dict[str, str] = {}  # by key of `wanted`, what a wrapped model calls it
    for name, value in model.state_dict().items():
        key = WRAPPERS.sub("", name)
        wanted[key], names[key] = value, name
    report = LoadReport(str(path_or_url), left_out=left_out)
    if reset_head:
        report.reset = sorted(key for key in HEAD if key in given or key in wanted)
        given = {key: value for key, value in given.items() if key not in HEAD}
        wanted = {key: value for key, value in wanted.items() if key not in HEAD}
    if resize:
        report.adapted = _adapt_stem(given, wanted)
        map_size = getattr(model, "train_resolution", None)
        report.resized, report.continued, report.dropped = resize_state(given, wanted, map_size)
    for name, layer in model.named_modules():
        if isinstance(layer, FocalFastAttention):
            prefix = f"{WRAPPERS.sub('', name)}."
            absent = [prefix + key for key in layer.key_buffers if prefix + key not in given]
            report.kept += [*absent, *layer.stale_keys(given, prefix)]
    own = {key: wanted.pop(key) for key in report.kept}
    stale = {key: given.pop(key) for key in report.kept if key in given}
    of_this_size = any(not x.is_nested and x.shape == own[key].shape for key, x in stale.items())
    check_state(given, wanted, report.path)
    loaded = {names.get(key, key): value for key, value in (given | own).items()}
    model.load_state_dict(loaded, strict=False)  # complete but for what the report says
    _log(report, logging.WARNING if of_this_size else logging.INFO)
    return report


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DataParallel and DistributedDataParallel."""
    while (inner := model._modules.get("_orig_mod", model._modules.get("module"))) is not None:
        model = inner
    return model


def _adapt_stem(given: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Fit a first convolution of 3 input channels to the model's number, as timm does; what was changed."""
    old, new = given.get(STEM), wanted.get(STEM)
    if old is None or new is None or not (is_plain(old) and old.is_floating_point()):
        return []
    if old.shape == new.shape or old.shape != (new.shape[0], RGB, *new.shape[2:]):
        return []
    given[STEM] = adapt_input_conv(new.shape[1], old)
    return [STEM]


def _log(report: LoadReport, level_of_kept: int = logging.INFO) -> None:
    """Say what was not simply loaded."""
    for level, names, text in (
        (logging.WARNING, report.reset, "the classifier is not loaded (reset_head)"),
        (logging.WARNING, report.continued, "rings that it lacks are continued from its own windows' tables"),
        (logging.WARNING, report.dropped, "rings that the model lacks are dropped"),
        (logging.WARNING, report.left_out, "parts of a larger model are left out"),
        (logging.WARNING, report.adapted, "made for 3 input channels, adapted to the model's number"),
        (logging.INFO, report.resized, "made for other windows or another input size, resized"),
        (level_of_kept, report.kept, "not the nearest keys here, or none, so the model's own stay"),
    ):
        if names:
            logger.log(level, "%s: %s: %d: %s", report.path, text, len(names), _listed(names))


def check_state(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], origin: str) -> None:
    """Raise ValueError listing all differences between two state dicts."""
    missing, unexpected = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    common = sorted(given.keys() & wanted.keys())
    unlike = [key for key in common if given[key].shape != wanted[key].shape]
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
    if problems:
        raise ValueError(
            f"{origin} does not fit the model; nothing was loaded. {ADVICE}\n  " + "\n  ".join(problems)
        )


def _kind(tensor: Tensor) -> str:
    layout = "" if tensor.layout == torch.strided else f" {tensor.layout}"
    return f"{tensor.dtype}{layout}{' without values' if tensor.is_meta else ''}"


def _listed(names: list[Any]) -> str:
    more = f", ... ({len(names) - SHOWN_KEYS} more)" if len(names) > SHOWN_KEYS else ""
    return ", ".join(shown(name) for name in names[:SHOWN_KEYS]) + more
