"""Console, one log file per rank, metrics.jsonl, TensorBoard and Weights & Biases."""

import contextlib
import errno
import json
import logging
import math
import os
import sys
from pathlib import Path
from typing import IO, Any

OWN_LOGGERS = ("main", "training", "lr_scheduler", "models", "data")  # log at every level
logger = logging.getLogger("main")

_handlers: list[logging.Handler] = []  # installed by create_logger


def create_logger(output: Path, rank: int) -> None:
    """Send all log messages to the console on rank 0, and to `log_rank{rank}.txt` on every rank.

    Modules log to `logging.getLogger(__name__)`; of other libraries, warnings and errors are shown.

    Args:
        output: existing folder of the log file.
        rank: of this process.
    """
    root = logging.getLogger()
    while _handlers:
        old = _handlers.pop()
        root.removeHandler(old)
        old.close()
    file = logging.FileHandler(output / f"log_rank{rank}.txt", encoding="utf-8", errors="backslashreplace")
    _handlers.append(file)
    if rank == 0:
        console = logging.StreamHandler(sys.stdout)
        console.setLevel(logging.INFO)
        _handlers.append(console)
    line = "[%(asctime)s] (%(filename)s %(lineno)d): %(levelname)s %(message)s"
    for handler in _handlers:
        handler.setFormatter(logging.Formatter(line, datefmt="%Y-%m-%d %H:%M:%S"))
        handler.handleError = _handle_error
        root.addHandler(handler)
    for name in OWN_LOGGERS:
        logging.getLogger(name).setLevel(logging.DEBUG)


def _handle_error(record: logging.LogRecord) -> None:
    """What cannot be written, as on a full disk, is lost, without a traceback for each line."""
    if not isinstance(sys.exc_info()[1], OSError):
        logging.Handler().handleError(record)


class TensorBoard:
    """Numbers for TensorBoard, in a folder for each kind, whose horizontal axes differ."""

    name = "TensorBoard"

    def __init__(self, output: Path, **next_positions: int) -> None:
        """
        Args:
            output: folder of the run.
            next_positions: of each kind; what an earlier start recorded there or later is hidden.
        """
        from torch.utils.tensorboard import SummaryWriter

        self.writers = {
            kind: SummaryWriter(str(output / "tensorboard" / kind), purge_step=position)
            for kind, position in next_positions.items()
        }

    def add(self, kind: str, position: int, values: dict[str, float | int]) -> None:
        for name, value in values.items():
            self.writers[kind].add_scalar(f"{kind}/{name}", value, position)

    def close(self, failed: bool = False, preempted: bool = False) -> None:
        for writer in self.writers.values():
            writer.close()


class WeightsAndBiases:
    """Numbers for Weights & Biases. The id of its run stays in the output folder."""

    name = "Weights & Biases"
    ID_NAME = "wandb_id.txt"

    def __init__(self, output: Path, continues: bool, **options: Any) -> None:
        """
        Args:
            output: folder of the run.
            continues: whether to continue the run that was recorded from this folder.
            options: of `wandb.init`.

        Raises:
            Exception: of many kinds: no network, no login.
        """
        import wandb

        logging.getLogger("wandb").propagate = False  # it has a log of its own
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "10")  # seconds: a stopped job is killed soon
        path = output / self.ID_NAME
        old_id = path.read_text(encoding="utf-8").strip() if continues and path.is_file() else None
        self.run = wandb.init(dir=output, id=old_id or None, resume="allow", **options)
        try:
            path.write_text(self.run.id, encoding="utf-8")
            for kind in ("train", "epoch"):
                self.run.define_metric(f"{kind}/*", step_metric=f"{kind}/position")
        except Exception:
            self.close()
            raise

    def add(self, kind: str, position: int, values: dict[str, float | int]) -> None:
        named = {f"{kind}/{name}": value for name, value in values.items()}
        self.run.log(named | {f"{kind}/position": position})

    def close(self, failed: bool = False, preempted: bool = False) -> None:
        if preempted:
            self.run.mark_preempting()  # so that an exit code is no failure
        self.run.finish(exit_code=int(failed))


class Metrics:
    """Appends one JSON object per line to `metrics.jsonl`, and mirrors the numbers to other tools.

    A mirror that fails is left out from then on, with a warning; training goes on.

    Args:
        output: existing folder; None records nothing (every rank but the first).
    """

    NAME = "metrics.jsonl"

    def __init__(self, output: Path | None) -> None:
        self.output = output
        self.file: IO[bytes] | None = None
        if output is not None:
            self.file = (output / self.NAME).open("ab", buffering=0)
        self.mirrors: list[TensorBoard | WeightsAndBiases] = []
        self.unwritten = b""  # records that a full disk did not take

    def start(self, kind: type[TensorBoard] | type[WeightsAndBiases], *args: Any, **options: Any) -> None:
        """Mirror to a tool from now on; the arguments are those of its class, after the folder."""
        if self.output is None:
            return
        try:
            self.mirrors.append(kind(self.output, *args, **options))
        except Exception as error:  # a failure of its own must not stop training
            logger.warning(f"{kind.name} records nothing: {error}")

    def write(self, kind: str, position: int, **values: float | int) -> None:
        """Record one point. If the disk is full, it is written with the next one.

        Args:
            kind: 'train' (a logging interval) or 'epoch'.
            position: horizontal axis in the mirrors.
            values: numbers; nan and inf become null, since JSON has neither.
        """
        if self.file is None:
            return
        record = {name: value if math.isfinite(value) else None for name, value in values.items()}
        record = {"kind": kind, "position": position, **record}
        self.unwritten += (json.dumps(record, allow_nan=False) + "\n").encode()
        self.flush()
        for mirror in list(self.mirrors):
            try:
                mirror.add(kind, position, values)
            except Exception as error:  # a failure of its own must not stop training
                self.mirrors.remove(mirror)
                logger.warning(f"{mirror.name} records no more: {error}")
                with contextlib.suppress(Exception):
                    mirror.close()

    def flush(self) -> None:
        """Write all records."""
        if self.file is None or not self.unwritten:
            return
        try:
            size = self.file.seek(0, os.SEEK_END)
            if self.file.write(self.unwritten) < len(self.unwritten):  # a full disk may take a part
                self.file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.unwritten = b""
        except OSError as error:
            logger.error(
                f"{self.file.name}: expected to write metrics, got: {error.strerror}; they are written "
                "later, if there is space again"
            )

    def sync(self) -> None:
        """fsync the file, before a checkpoint is written from which training would go on after its lines."""
        if self.file is None:
            return
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            logger.error(f"{self.file.name}: expected to write metrics to the disk, got: {error.strerror}")

    def truncate(self, next_step: tuple[int, int], epochs: int) -> dict[str, int]:
        """Drop what a resumed run records again, and an unfinished line that a killed process may have left.

        Other lines that are no records stay, with a warning.

        Args:
            next_step: epoch and step that training goes on with.
            epochs: how many have been evaluated.

        Returns:
            The first position of each kind that no record has.
        """
        size, positions = 0, {"train": 0, "epoch": 0}
        if self.file is None:
            return positions
        for number, line in enumerate(Path(self.file.name).read_bytes().split(b"\n")[:-1], 1):
            try:
                record = json.loads(line)
                kind, epoch = record["kind"], record["epoch"]
                place, limit = ((epoch, record["step"]), next_step) if kind == "train" else (epoch, epochs)
                is_again, after = place >= limit, max(positions[kind], record.get("position", -1) + 1)
            except (ValueError, TypeError, LookupError, RecursionError):
                logger.warning(f"{self.file.name}:{number}: expected a record, got {line[:100]!r}; it stays")
            else:
                if is_again:
                    break
                positions[kind] = after
            size += len(line) + 1
        self.file.truncate(size)
        return positions

    def close(self, failed: bool = False, preempted: bool = False) -> None:
        """Close the file and the mirrors; errors of the mirrors are logged as warnings.

        Args:
            failed: whether the run ends by an error or a signal.
            preempted: whether it is a signal, after which the run will be continued.
        """
        self.flush()
        if self.file is not None:
            self.file.close()
        for mirror in self.mirrors:
            try:
                mirror.close(failed, preempted)
            except Exception as error:  # as above
                logger.warning(f"{mirror.name} lacks what was recorded last: {error}")
