"""Where a run reports: console, one log file per process, metrics.jsonl and TensorBoard."""

import errno
import itertools
import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

OWN_LOGGERS = (  # heard at every level
    *(
        "main",
        "engine",
        "train_state",
        "storage",
        "saver",
        "checkpoints",
        "trainer",
        "run_folder",
        "lr_scheduler",
        "models",
        "data",
    ),
)
logger = logging.getLogger("main")

_handlers: list[logging.Handler] = []  # the ones create_logger has installed
_bars: list[Any] = []  # progress bars that are shown now


def create_logger(output: Path | None = None, rank: int = 0) -> None:
    """Send all log messages to the console on rank 0, and to ``log_rank{rank}.txt`` on every rank.

    Modules log through ``logging.getLogger(__name__)``; other libraries are heard from level WARNING on.

    Args:
        output: existing folder of the log file; None for no file.
        rank: of this process.
    """
    line = "[%(asctime)s] (%(filename)s %(lineno)d): %(levelname)s %(message)s"
    root = logging.getLogger()
    while _handlers:
        old = _handlers.pop()
        root.removeHandler(old)
        old.close()
    if rank == 0:
        console = _Console(sys.stdout)
        console.setLevel(logging.INFO)
        console.setFormatter(logging.Formatter(_coloured(line), datefmt="%Y-%m-%d %H:%M:%S"))
        _handlers.append(console)
    if output is not None:
        file = logging.FileHandler(output / f"log_rank{rank}.txt", encoding="utf-8")
        file.setFormatter(logging.Formatter(line, datefmt="%Y-%m-%d %H:%M:%S"))
        _handlers.append(file)
    for handler in _handlers:
        root.addHandler(handler)
    for name in OWN_LOGGERS:
        logging.getLogger(name).setLevel(logging.DEBUG)


class _Console(logging.StreamHandler):
    """Writes lines above a progress bar, if one is shown, instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        if not _bars:
            super().emit(record)
            return
        try:
            _bars[-1].write(self.format(record), file=self.stream)
        except Exception:  # as every handler of the standard library
            self.handleError(record)


def _coloured(line: str) -> str:
    """The prefix of ``line`` in colour, where the console shows colours and termcolor is installed."""
    if not sys.stdout.isatty():
        return line
    try:
        from termcolor import colored
    except ImportError:
        return line
    prefix, message = line.split(" %(levelname)s ")
    return f"{colored(prefix, 'green')} %(levelname)s {message}"


def progress(batches: Iterable[Any], title: str, show: bool) -> Iterable[Any]:
    """``batches`` under a progress bar, if wanted, the output is a terminal and tqdm is installed."""
    if not show or not sys.stderr.isatty():
        return batches
    try:
        from tqdm import tqdm
    except ImportError:
        return batches
    return _under_bar(tqdm(batches, desc=title, leave=False, dynamic_ncols=True))


def _under_bar(bar: Any) -> Iterator[Any]:
    """The batches of a progress bar, which is known to the console while they last."""
    _bars.append(bar)
    try:
        yield from bar
    finally:
        _bars.remove(bar)
        bar.close()


class Metrics:
    """Appends one JSON object per line to ``metrics.jsonl``, and mirrors numbers to TensorBoard.

    Args:
        output: existing folder; None records nothing (every process but the first).
    """

    def __init__(self, output: Path | None) -> None:
        self.file: IO[bytes] | None = None
        self.board = None
        self.size = 0  # of what is in the file
        self.unwritten = b""
        if output is None:
            return
        self._open(output / "metrics.jsonl")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self.board = SummaryWriter(str(output / "tensorboard"))

    def _open(self, path: Path) -> None:
        _drop_partial_line(path)
        self.file = path.open("ab", buffering=0)
        self.size = self.file.seek(0, os.SEEK_END)

    def write(self, kind: str, position: int, **values: float | int) -> None:
        """Record one point. What cannot be written, for the disk is full, is kept for the next time.

        Args:
            kind: 'train' (a logging interval) or 'epoch'.
            position: horizontal axis in TensorBoard.
            values: numbers; a non-finite one becomes null, which JSON can hold.
        """
        if self.file is None:
            return
        record = {name: _json_number(value) for name, value in values.items()}
        self.unwritten += (json.dumps({"kind": kind, **record}, allow_nan=False) + "\n").encode()
        self.flush()
        if self.board is not None:
            try:
                for name, value in values.items():
                    self.board.add_scalar(f"{kind}/{name}", value, position)
            except OSError as error:
                self.board = None
                logger.warning(f"TensorBoard records no more: {error}")

    def flush(self) -> int:
        """Write what could not be written before; the length of the file with all records, in bytes."""
        if self.file is None:
            return 0
        try:
            if self.unwritten:
                written = self.file.write(self.unwritten)
                if written < len(self.unwritten):  # a full disk takes a part first
                    self.file.truncate(self.size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self.size += written
                self.unwritten = b""
        except OSError as error:
            logger.error(f"{self.file.name}: expected to write metrics, got: {error.strerror}; they are kept")
        return self.size + len(self.unwritten)

    def sync(self) -> None:
        """Have on the disk what is in the file, so that no checkpoint outlives lines that it counts on."""
        if self.file is None:
            return
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            logger.error(f"{self.file.name}: expected to write metrics to the disk, got: {error.strerror}")

    def rewind(self, size: int) -> None:
        """Drop what was recorded after the first ``size`` bytes: a resumed run records it again."""
        if self.file is None:
            return
        if size > self.size:
            logger.warning(
                f"{self.file.name}: expected the {size:,} bytes that were recorded before the checkpoint, "
                f"got {self.size:,}: lines are missing here (a power loss, or a full disk); training goes on"
            )
            return
        self.file.truncate(size)
        self.size = size

    def set_aside(self) -> None:
        """Keep what was recorded under another name, for a run that begins anew.

        Raises:
            OSError: it cannot be renamed.
        """
        if self.file is None or not self.size:
            return
        path = Path(self.file.name)
        names = (path.with_name(f"{path.name}.before-{number}") for number in itertools.count(1))
        kept = next(name for name in names if not name.exists())
        self.file.close()
        path.rename(kept)
        self._open(path)
        logger.warning(f"training begins anew; what {path.name} held of an earlier run is now in {kept}")

    def close(self) -> None:
        """Close the files; what TensorBoard has lost is told, and ends no run."""
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            try:
                self.board.close()
            except OSError as error:
                logger.warning(f"TensorBoard lacks what was recorded last: {error}")


def _json_number(value: float | int) -> float | int | None:
    return value if math.isfinite(value) else None


def _drop_partial_line(path: Path) -> None:
    """Cut a last line that a killed process left unfinished, so that every line stays valid JSON."""
    if not path.exists():
        return
    content = path.read_bytes()
    complete = content.rfind(b"\n") + 1
    if complete < len(content):
        os.truncate(path, complete)
