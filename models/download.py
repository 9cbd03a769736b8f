"""Files of the web, fetched once and whole into the torch.hub cache; each address has its own name there."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import uuid
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import torch

TIMEOUT_SECONDS = 60  # without a byte
HASH_LETTERS = 8


def is_address(path_or_url: str | Path) -> bool:
    """Whether this is an http(s) address, not a file."""
    return str(path_or_url).lower().startswith(("http://", "https://"))


def kept_path(url: str) -> Path:
    """Where the file of an address is kept: NAME-HASH.ENDING. Many addresses end in the same name."""
    name = Path(urlparse(url).path)
    digest = hashlib.sha256(url.encode()).hexdigest()[:HASH_LETTERS]
    return Path(torch.hub.get_dir()) / "checkpoints" / f"{name.stem}-{digest}{name.suffix}"


def fetch(url: str) -> Path:
    """The file of an address, from the cache if it is there.

    Raises:
        ValueError: it could not be fetched, or not to its end; nothing is kept.
    """
    target = kept_path(url)
    if target.exists():
        return target
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}.partial")  # other processes fetch, too
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _copy(url, partial)
        os.replace(partial, target)
    except (OSError, HTTPException, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{url}: could not be fetched ({reason}); pass a local file instead") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return target


def _copy(url: str, target: Path) -> None:
    """Write what an address holds to a file; ValueError where it ends before the announced length."""
    request = Request(url, headers={"User-Agent": "focal-transformer"})
    with urlopen(request, timeout=TIMEOUT_SECONDS) as answer, open(target, "wb") as file:
        shutil.copyfileobj(answer, file)
        expected, got = answer.headers.get("Content-Length"), file.tell()
    if expected is not None and got != int(expected):
        raise ValueError(f"expected {int(expected):,} bytes, got {got:,}")
