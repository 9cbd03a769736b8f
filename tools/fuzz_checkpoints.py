"""Hostile checkpoints for tools/fuzz.py: programs in pickles, claims without values, tensors of odd kinds."""

import io
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from fuzz_common import CANARY, Target, damage, write

from models import FocalTransformer, load_checkpoint

State = dict[Any, Any]


@lru_cache
def model() -> FocalTransformer:
    """The small Focal-fast that all checkpoints here are for."""
    torch.manual_seed(0)
    lists = {"focal_levels": [2, 2], "focal_windows": [3, 3], "expand_sizes": [3, 3]}
    options = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "num_classes": 3, "focal_pool": "fc"}
    return FocalTransformer(kind="focalv2", **options, **lists).eval()


@lru_cache
def _weights() -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model().state_dict().items()}


def fresh() -> State:
    """A state dict that fits."""
    return {name: value.clone() for name, value in _weights().items()}


def check(path: Path) -> None:
    """Load into the model; a refused file must leave it as it was, an accepted one finite."""
    before = _weights()
    try:
        load_checkpoint(model(), path)
        if not all(value.isfinite().all() for value in model().state_dict().values()):
            raise RuntimeError("weights that are not finite were loaded")
    except (ValueError, FileNotFoundError):
        if not all(torch.equal(value, before[name]) for name, value in model().state_dict().items()):
            raise RuntimeError("a refused file changed the model") from None
        raise
    finally:
        model().load_state_dict(before)


def saved(content: Any, legacy: bool = False, **options: Any) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy, **options)
    return buffer.getvalue()


def with_pickle(content: bytes, instructions: bytes) -> bytes:
    """A checkpoint archive with other instructions."""
    return repacked(content, {"data.pkl": instructions})


def repacked(content: bytes, records: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A checkpoint archive, with some records exchanged."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", method) as new:
        for info in old.infolist():
            new.writestr(info.filename, records.get(info.filename.partition("/")[2], old.read(info)))
    return buffer.getvalue()


# --- Programs -----------------------------------------------------------------------------------------------


class _Call:
    """Calls a function when unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def _named_global(module: str, name: str, *arguments: str) -> bytes:
    """A pickle that calls module.name with text."""
    words = b"".join(b"X" + struct.pack("<I", len(text)) + text.encode() for text in arguments)
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(" + words + b"tR."


def _bombs() -> dict[str, Callable[[Path], Path]]:
    calls = {
        "os.system": ("posix", "system", "touch {}"),
        "eval": ("builtins", "eval", "open({!r}, 'w')"),
        "exec": ("__builtin__", "exec", "open({!r}, 'w')"),
        "subprocess": ("subprocess", "getoutput", "touch {}"),
        "import": ("importlib", "import_module", "antigravity"),
        "torch.load": ("torch", "load", "{}"),
        "torch.hub": ("torch.hub", "download_url_to_file", "file:///etc/hostname", "{}"),
        "open": ("io", "open", "{}", "w"),
        "dotted name": ("os", "path.os.system", "touch {}"),
        "StorageType": ("torch", "FloatStorage.__init__", "{}"),
        "bytearray": ("builtins", "bytearray", "{}"),
    }
    cases: dict[str, Callable[[Path], Path]] = {}
    for name, (module, function, *texts) in calls.items():

        def make(folder: Path, parts: tuple[str, str, list[str]] = (module, function, texts)) -> bytes:
            texts = [text.format(str(folder / CANARY)) for text in parts[2]]
            return _named_global(parts[0], parts[1], *texts)

        cases[f"bomb {name}, archive"] = lambda folder, make=make: write(
            folder / "bomb.pth", with_pickle(saved(fresh()), make(folder))
        )
        cases[f"bomb {name}, bare"] = lambda folder, make=make: write(folder / "bomb.pth", make(folder))
    for legacy in (True, False):
        cases[f"bomb beside weights, {'legacy' if legacy else 'archive'}"] = lambda folder, legacy=legacy: (
            write(
                folder / "bomb.pth",
                saved(fresh() | {"extra": _Call(eval, f"open({str(folder / CANARY)!r}, 'w')")}, legacy),
            )
        )
    cases["bomb in a key"] = lambda folder: write(
        folder / "bomb.pth",
        with_pickle(saved({}), b"\x80\x02}" + _named_global("os", "getcwd")[2:-1] + b"Ns."),
    )
    return cases


# --- Claims -------------------------------------------------------------------------------------------------


def _claim(
    numel: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, legacy: bool = False
) -> bytes:
    """A checkpoint with one tensor of eight stored values that claims something else."""
    content = saved({"head.weight": torch.zeros(8)}, legacy)
    plain = b"K\x08" + b"N" * legacy + b"tq", b"QK\x00K\x08\x85", b"K\x01\x85"

    def count(value: int) -> bytes:
        return pickle.dumps(value, 2)[2:-1]

    def listed(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(count, values)) + b"t"

    instructions = content if legacy else zipfile.ZipFile(io.BytesIO(content)).read("archive/data.pkl")
    assert all(instructions.count(part) for part in plain), instructions
    changed = instructions.replace(plain[0], count(numel) + plain[0][2:], 1)
    changed = changed.replace(plain[1], b"Q" + count(offset) + listed(size), 1)
    place = changed.index(listed(size)) + len(listed(size))
    changed = changed[:place] + changed[place:].replace(plain[2], listed(stride), 1)
    return changed if legacy else with_pickle(content, changed)


CLAIMS: dict[str, tuple[Any, ...]] = {
    "huge storage": (2**40, (8,), (1,)),
    "huge shape": (8, (2**40,), (1,)),
    "huge strides": (8, (2, 2), (2**40, 1)),
    "huge offset": (8, (1,), (1,), 2**50),
    "offset below zero": (8, (1,), (1,), -4),
    "shape below zero": (8, (-8,), (1,)),
    "expanded": (8, (2**30, 8), (0, 1)),
    "overlapping": (8, (4, 5), (1, 1)),
    "product overflows": (8, (2**32, 2**32), (0, 0)),
    "beyond 64 bits": (8, (2**70,), (1,)),
    "one value too many": (9, (9,), (1,)),
    "a thousand dimensions": (8, (1,) * 1000, (1,) * 1000),
}


def _nested(opening: bytes, closing: bytes, depth: int) -> bytes:
    """A dict with a value in so many brackets."""
    return b"\x80\x02}X\x01\x00\x00\x00k" + opening * depth + b"N" + closing * depth + b"s."


def _pickles() -> dict[str, bytes]:
    """Instructions that are no program and no checkpoint."""
    return {
        "nested tuples": _nested(b"", b"\x85", 10**6),
        "nested lists": _nested(b"(", b"l", 10**5),
        "nested tuple as key": b"\x80\x02}N" + b"\x85" * 10**6 + b"Ns.",
        "doubling tuple as key": b"\x80\x02}K\x01"
        + b"".join(b"q%ch%c\x86" % (n, n) for n in range(60))
        + b"Ns.",
        "doubling tuple": b"\x80\x02}K\x00K\x01"
        + b"".join(b"q%ch%c\x86" % (n, n) for n in range(60))
        + b"s.",
        "endless dicts": b"\x80\x02(" + b"}" * (9 * 2**20) + b"t.",
        "many dicts": b"\x80\x02(" + b"}" * 2**20 + b"t.",
        "a dict in itself": b"\x80\x02}q\x00X\x01\x00\x00\x00kh\x00s.",
        "setitem on a tensor": b"\x80\x02K\x01K\x02K\x03s.",
        "setitem on a list": b"\x80\x02]K\x02K\x03s.",
        "no stack": b"\x80\x02s.",
        "no end": b"\x80\x02}",
        "memo without value": b"\x80\x02h\x07.",
        "long text": b"\x80\x02X\xff\xff\xff\xff.",
        "protocol 5": pickle.dumps({"a": 1}, 5),
        "a hidden method": b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsNsb.",
        "a number": b"\x80\x02K\x01.",
        "a list": b"\x80\x02].",
    }


# --- Tensors ------------------------------------------------------------------------------------------------

NAME = "head.weight"


def _with(name: Any, value: Any) -> Callable[[State], State]:
    return lambda state: state | {name: value(state) if callable(value) else value}


def _like(change: Callable[[torch.Tensor], Any]) -> Callable[[State], State]:
    return lambda state: state | {NAME: change(state[NAME])}


CONTENTS: dict[str, Callable[[State], Any]] = {
    "fits": lambda state: state,
    "under model": lambda state: {"model": state, "epoch": 3},
    "ordered": OrderedDict,
    "with module.": lambda state: {f"module.{name}": value for name, value in state.items()},
    "with and without module.": _with(f"module.{NAME}", lambda state: state[NAME]),
    "half": lambda state: {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
    "double": lambda state: {k: v.double() if v.is_floating_point() else v for k, v in state.items()},
    "transposed": _like(lambda value: value.t().contiguous().t()),
    "part of a larger one": _like(lambda value: torch.cat([value, value])[: len(value)]),
    "parameter": _like(torch.nn.Parameter),
    "nan": _like(lambda value: value * float("nan")),
    "one inf": _like(lambda value: value.clone().index_fill_(0, torch.tensor([0]), float("inf"))),
    "overflow to inf": _like(lambda value: value.double() + 1e300),
    "integers": _like(torch.Tensor.long),
    "bool": _like(torch.Tensor.bool),
    "complex": _like(lambda value: value.to(torch.complex64)),
    "float8": _like(lambda value: value.to(torch.float8_e4m3fn)),
    "sparse": _like(torch.Tensor.to_sparse),
    "quantized": _like(lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)),
    "meta": _like(lambda value: value.to("meta")),
    "expanded": _like(lambda value: value[:1].expand(value.shape)),
    "overlapping": _like(lambda value: value.flatten().as_strided(value.shape, (1, 1))),
    "zero values": _like(lambda value: value[:0]),
    "no dimensions": _like(lambda value: value[0, 0]),
    "a dict for a tensor": _like(lambda value: {"weight": value}),
    "text for a tensor": _like(str),
    "none for a tensor": _like(lambda value: None),
    "number as key": _with(7, torch.zeros(1)),
    "none as key": _with(None, torch.zeros(1)),
    "tuple as key": _with((1, 2), torch.zeros(1)),
    "endless key": _with("a" * 10**6, torch.zeros(1)),
    "control characters": _with("\x1b[2J\x00\n\u202eevil", torch.zeros(1)),
    "surrogate": _with("\ud800", torch.zeros(1)),
    "many keys": lambda state: state | {f"extra.{n}": torch.zeros(1) for n in range(3000)},
    "model is text": lambda state: {"model": "weights"},
    "model in model": lambda state: {"model": {"model": state}},
    "empty model": lambda state: {"model": {}},
    "nothing": lambda state: {},
    "choice out of range": lambda state: {
        k: v if v.is_floating_point() else v + 10**6 for k, v in state.items()
    },
    "choice below zero": lambda state: {
        k: v if v.is_floating_point() else v - 10**6 for k, v in state.items()
    },
    "choice as bytes": lambda state: {k: v if v.is_floating_point() else v.byte() for k, v in state.items()},
    "a tensor alone": lambda state: state[NAME],
    "a list": lambda state: list(state.values()),
    "none": lambda state: None,
    "bytes": lambda state: {"a": b"123"},
}


def _content(name: str, folder: Path, legacy: bool) -> Path:
    return write(folder / "content.pth", saved(CONTENTS[name](fresh()), legacy))


def _endless_record(folder: Path) -> Path:
    """A storage of zeros, packed to a thousandth."""
    packed = repacked(saved(fresh()), {"data/0": bytes(2**28)}, zipfile.ZIP_DEFLATED)
    return write(folder / "packed.pth", packed)


def _twice(folder: Path) -> Path:
    path = write(folder / "twice.pth", saved(fresh()))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(archive.namelist()[0], b"other")
    return path


def named() -> dict[str, Callable[[Path], Path]]:
    """All cases that have a name."""
    cases = _bombs()
    for name in CONTENTS:
        for legacy in (False, True):
            kind = f"{name}{', legacy' * legacy}"
            cases[kind] = lambda folder, name=name, legacy=legacy: _content(name, folder, legacy)
    for name, claim in CLAIMS.items():
        for legacy in (False, True):
            cases[f"claim: {name}{', legacy' * legacy}"] = lambda folder, claim=claim, legacy=legacy: write(
                folder / "claim.pth", _claim(*claim, *(() if len(claim) > 3 else (0,)), legacy)
            )
    for name, instructions in _pickles().items():
        cases[f"pickle: {name}"] = lambda folder, code=instructions: write(
            folder / "pickle.pth", with_pickle(saved({}), code)
        )
        cases[f"bare pickle: {name}"] = lambda folder, code=instructions: write(folder / "pickle.pth", code)
    files = {
        "empty": b"",
        "text": b"weights",
        "zeros": bytes(1000),
        "zip start": b"PK\x03\x04",
        "PK": b"PK\x05\x06" + bytes(18),
    }
    for name, content in files.items():
        cases[f"file: {name}"] = lambda folder, content=content: write(folder / "file.pth", content)
    return cases | {"packed record": _endless_record, "two records of one name": _twice}


@lru_cache
def _bases() -> list[tuple[bytes, tuple[int, ...]]]:
    """Good files, and where their instructions begin."""
    state = fresh()
    contents = [state, {"model": OrderedDict(state), "epoch": 1, "note": [1, 2.5, None, {"a": (1, 2)}]}]
    files = [saved(content, legacy) for content in contents for legacy in (True, False)]
    return [
        (file, tuple(file.find(word) for word in (b"\x80\x02}", b"_rebuild_tensor", b"storage")))
        for file in files
    ]


def mutated(draw: random.Random, folder: Path) -> tuple[str, Path]:
    """A good file with damages, anywhere or in its instructions (with the checksums made good)."""
    base, spots = draw.choice(_bases())
    if base.startswith(b"PK") and draw.random() < 0.5:
        with zipfile.ZipFile(io.BytesIO(base)) as archive:
            instructions = archive.read("archive/data.pkl")
        kind, changed = damage(instructions, draw)
        return f"pickle {kind}", write(folder / "mutated.pth", with_pickle(base, changed))
    kind, changed = damage(base, draw, spots)
    return kind, write(folder / "mutated.pth", changed)


TARGET = Target("checkpoints", named(), mutated, check, (ValueError, FileNotFoundError))
