"""Files of torch.save, read without executing anything in them.

`torch.load(weights_only=True)` builds tensors, numbers, text, lists and dicts. The types in `HARMLESS` are
read as well, because checkpoints of other tools hold them beside the weights. Any other object is refused.
"""

from __future__ import annotations

import datetime
import pickle
import re
import struct
import zipfile
import zlib
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from threading import Lock
from typing import Any, BinaryIO

import numpy as np
import torch

SHOWN_LETTERS = 120


class _NumpyDtype:
    """Stands for numpy.dtype, whose own way to unpickle sets internal flags."""

    def __init__(self, code: object, *_: object) -> None:
        self.dtype = np.dtype(str(code))

    def __setstate__(self, state: Sequence[Any]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


def _numpy_scalar(kind: _NumpyDtype, data: bytes) -> Any:
    """Stands for numpy's function of this name."""
    return np.frombuffer(data, kind.dtype)[0]


class _Ignored:
    """Stands for logs beside the weights, of which nothing is needed."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


_PATHS = {"PosixPath": PurePosixPath, "WindowsPath": PureWindowsPath}
ONE_AT_A_TIME = Lock()
HARMLESS: list[Any] = [  # (what is built, its name in the file)
    (OrderedDict, "yacs.config.CfgNode"),
    (Namespace, "argparse.Namespace"),
    *((getattr(datetime, name), f"datetime.{name}") for name in ("date", "datetime", "time", "timedelta")),
    *(
        (kind, f"{module}.{prefix}{name}")
        for name, kind in _PATHS.items()
        for prefix in ("", "Pure")
        for module in ("pathlib", "pathlib._local")
    ),
    (_NumpyDtype, "numpy.dtype"),
    *((_numpy_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    # MMEngine's logs: buffers of numpy arrays with methods of their own
    *((_Ignored, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((_Ignored, name) for name in ("numpy.ndarray", "builtins.getattr", "__builtin__.getattr")),
    (_Ignored, "mmengine.logging.history_buffer.HistoryBuffer"),
]
_DAMAGE = (  # what torch.load and zipfile raise on files that are not whole
    *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, EOFError),
    *(LookupError, ValueError, TypeError, AttributeError, AssertionError, OverflowError),
)


def read_torch_file(path: Path) -> dict[str, Any]:
    """The dict in a file, its tensors on the CPU.

    Raises:
        OSError: it cannot be read, or does not fit into memory.
        ValueError: it is damaged or no checkpoint, holds no dict, or would execute code.
    """
    try:
        with open(path, "rb") as file:
            _check_checksums(file)
            with ONE_AT_A_TIME, torch.serialization.safe_globals(HARMLESS):  # a list of the process
                content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise OSError(f"{path}: expected a file that can be read, got: {shown(error)}") from error
    except MemoryError as error:
        raise OSError(f"{path}: {path.stat().st_size:,} bytes do not fit into memory") from error
    except _DAMAGE as error:
        raise ValueError(f"{path}: {_reason(str(error) or type(error).__name__)}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a dict of tensors, found {type(content).__name__}")
    return dict(content)


def _check_checksums(file: BinaryIO) -> None:
    """Raise BadZipFile where a record of an archive was changed; torch.load does not look."""
    if file.read(4) == b"PK\x03\x04" and (broken := zipfile.ZipFile(file).testzip()):
        raise zipfile.BadZipFile(f"record {broken!r} has a wrong checksum")
    file.seek(0)


def _reason(error: str) -> str:
    """Why a file could not be read, from the text of torch.load's error."""
    refused = re.search(r"GLOBAL (\S+)", error)
    if refused or "TorchScript" in error:
        what = shown(refused[1]) if refused else "a TorchScript program"
        return (
            f"refused, because reading it would execute code ({what}). A checkpoint may hold tensors, "
            "numbers, text, lists and dicts; save it again without the rest"
        )
    short = re.search(r"WeightsUnpickler error:\s*(.+)", error)
    text = short[1] if short else error.partition("In PyTorch 2.6")[0]
    if "Unsupported operand" in text:
        return (
            f"not a checkpoint, or damaged, or saved with a pickle protocol other than 2 ({shown(text)}); "
            "get it again, or save it again with torch.save(..., pickle_protocol=2)"
        )
    return f"not a checkpoint, or damaged ({shown(text)}); get it again"


def shown(value: Any) -> str:
    """Text of a file for a message: not endless, in one line, and nothing that steers a terminal."""
    text = " ".join(str(value).split()) or type(value).__name__
    text = text if len(text) <= SHOWN_LETTERS else f"{text[:SHOWN_LETTERS]}..."
    return text if text.isprintable() else repr(text)
