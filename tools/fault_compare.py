"""Compares what two finished runs have written: checkpoints to the last bit, metrics but for the times."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from fault_common import FaultError, Trainer

from models import read_checkpoint

BEST_IS_LOST = "ends without the best weights"
TIME_FIELDS = {"img_per_s", "minutes", "memory_mb", "data_ms", "step_ms", "save_ms"}
NOT_COMPARED = {  # of a checkpoint: the own folder, times, and a length that times have a part in
    *("config", "seconds", "interval_seconds", "metrics_size"),
}


@dataclass
class Comparison:
    """What two finished runs have in common, and not.

    Attributes:
        tensors: how many were compared bit by bit.
        records: lines of metrics.jsonl that were compared.
        differences: what is not the same, in words.
        note: what was left out.
    """

    tensors: int = 0
    records: int = 0
    differences: list[str] = field(default_factory=list)
    note: str = ""

    def require_none(self) -> str:
        """A sentence for the table.

        Raises:
            FaultError: the runs differ.
        """
        if self.differences:
            raise FaultError(f"{len(self.differences)} differences: {'; '.join(self.differences[:3])}")
        return f"{self.tensors} tensors bit-identical, {self.records} metrics equal{self.note}"


def compare(run: Trainer, reference: Trainer) -> Comparison:
    """Last checkpoint, best checkpoint and metrics of a run against those of one that was left alone."""
    result = Comparison()
    names = [f"ckpt_epoch_{reference.setting.epochs - 1}.pth", "best.pth"]
    if f"{names[-1]} {BEST_IS_LOST}" in run.text():
        result.note = f" (the best {names.pop()} was refused by the disk, says the run)"
    for name in names:
        paths = [trainer.folder / name for trainer in (run, reference)]
        missing = [str(path) for path in paths if not path.exists()]
        if missing:
            result.differences.append(f"no {' and no '.join(missing)}")
            continue
        ours, theirs = ({p: leaf for p, leaf in leaves(read_checkpoint(path))} for path in paths)
        if name == "best.pth" and was_refused(run) and same(ours.get("/accuracy"), theirs.get("/accuracy")):
            result.note = f" (the first of two equally good {name} was refused by the disk)"
            continue
        result.tensors += sum(torch.is_tensor(leaf) for leaf in theirs.values())
        for key in ours.keys() | theirs.keys():
            if NOT_COMPARED.isdisjoint(key.split("/")) and not same(ours.get(key), theirs.get(key)):
                result.differences.append(f"{name}{key}")
    records = [list(metrics(trainer)) for trainer in (run, reference)]
    result.records = len(records[1])
    if len(records[0]) != len(records[1]):
        result.differences.append(f"{len(records[0])} lines of metrics instead of {len(records[1])}")
    for number, (our, their) in enumerate(zip(*records, strict=False), 1):
        if our != their:
            result.differences.append(f"metrics line {number}: {our} instead of {their}")
    left = run.temporary_files()
    if left:
        result.differences.append(f"temporary files left: {', '.join(path.name for path in left)}")
    return result


def was_refused(run: Trainer) -> bool:
    """Whether the disk refused a best checkpoint in any launch; a later one, as accurate, is as good."""
    return "best.pth: expected to write" in run.console.read_text(errors="replace")


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of everything in nested dicts and lists."""
    if isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{path}/{key}")
    else:
        yield path, tree


def same(left: Any, right: Any) -> bool:
    """Whether two leaves are the same; tensors to the last bit."""
    if not (torch.is_tensor(left) and torch.is_tensor(right)):
        return type(left) is type(right) and bool(left == right)
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(*(tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (left, right)))


def metrics(trainer: Trainer, kind: str = "") -> Iterator[dict[str, Any]]:
    """The records of a run without time and memory; of one kind, if asked for."""
    for line in (trainer.folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if kind in ("", record["kind"]):
            yield {name: value for name, value in record.items() if name not in TIME_FIELDS}
