"""The faults of storage and of input: damaged checkpoints, disks that refuse, images that rot, numbers gone.

A refusing disk is a real one: a limit on the size of files (RLIMIT_FSIZE), a small tmpfs filled to the brim,
a folder made immutable. What the system or the user's rights do not allow is told and left out.
"""

import contextlib
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from fault_cases import SAVE_EVERY, Lab, kill_at_step
from fault_common import BATCH_SIZE, FaultError, Row, Setting, Trainer
from fault_compare import compare, metrics
from torch import nn

from training import checkpoints as storage
from training.checkpoints import AsyncCheckpointWriter, write_checkpoint

FILE_LIMIT = 768 * 1024  # bytes; more than any log or metrics here, less than a checkpoint
DISK_MB = 24
REFUSED = (
    "File too large",
    "No space left",
    "Operation not permitted",
    "Permission denied",
    "Is a directory",
)
BIG = {"MODEL__FOCAL__EMBED_DIM": 192, "MODEL__FOCAL__NUM_HEADS": [3, 6]}  # enough to take time
WIDTH = 4096  # of a layer whose state has 192 MB
ROUNDS = 7
GROUP = 8  # steps from save to save, where delays are measured

Undo = Callable[[], None]


# --- Damaged checkpoints ------------------------------------------------------------------------------------


def truncate(path: Path, lab: Lab) -> None:
    os.truncate(path, int(path.stat().st_size * lab.rng.uniform(0.05, 0.95)))


def flip_bit(path: Path, lab: Lab) -> None:
    content = bytearray(path.read_bytes())
    content[lab.rng.randrange(len(content))] ^= 1 << lab.rng.randrange(8)
    path.write_bytes(content)


def empty(path: Path, lab: Lab) -> None:
    os.truncate(path, 0)


DAMAGES: dict[str, Callable[[Path, Lab], None]] = {
    "truncated": truncate,
    "one bit flipped": flip_bit,
    "zero bytes": empty,
}


def damage(lab: Lab) -> list[Row]:
    """The newest checkpoint is damaged while the run is down; then all of them are."""
    setting = Setting()
    trainer, total, done = lab.trainer(setting), setting.steps, []
    points = sorted(lab.rng.sample(range(4 * SAVE_EVERY, total - SAVE_EVERY), len(DAMAGES) + 1))
    for number, (kind, spoil) in zip(points, [*DAMAGES.items(), ("all", empty)], strict=True):
        trainer.launch()
        kill_at_step(trainer, number, lab)
        newest = storage.find_newest(trainer.folder)
        spoiled = [path for path in trainer.folder.glob("*.pth") if kind == "all" or path == newest]
        for path in spoiled:
            spoil(path, lab)
        trainer.launch()
        trainer.until_step(1)
        warnings = " ".join(line for line in trainer.log_text().splitlines() if "WARNING" in line)
        trainer.kill()
        unnamed = [path.name for path in spoiled if path.name not in warnings]
        if unnamed or not spoiled:
            raise FaultError(f"{kind}: {len(spoiled)} files, no warning names {unnamed}")
        what = "every checkpoint emptied" if kind == "all" else f"newest checkpoint, {kind}"
        outcome = "warned of each, began anew" if kind == "all" else "warned, went on from the one before"
        names = f"{len(spoiled)} files" if kind == "all" else spoiled[0].name
        done.append((what, f"{setting}, after step {number}: {names}", outcome))
    trainer.launch()
    trainer.finish()
    verified = compare(trainer, lab.reference(setting)).require_none()
    redone = trainer.redone_by_launch()[1::2]
    return [Row(*words, 1, count, verified) for words, count in zip(done, redone, strict=True)]


# --- Disks that refuse --------------------------------------------------------------------------------------


def limit_files(trainer: Trainer) -> Undo:
    """No file of the main process may grow beyond FILE_LIMIT."""
    pid = trainer.ranks[0]
    old = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (FILE_LIMIT, old[1]))

    def undo() -> None:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, old)

    return undo


def make_immutable(trainer: Trainer) -> Undo:
    """No file may appear in or vanish from the run's folder."""
    folder = str(trainer.folder)
    if os.geteuid():
        os.chmod(folder, 0o555)
        return lambda: os.chmod(folder, 0o755)
    subprocess.run(["chattr", "+i", folder], check=True, capture_output=True)
    return lambda: subprocess.run(["chattr", "-i", folder], check=True) and None


def fill_disk(trainer: Trainer) -> Undo:
    """Not a byte is left on the small disk of ``small_disk``."""
    filler = trainer.folder.parent / "filler"
    assert os.path.ismount(filler.parent)
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler.unlink


def block_names(trainer: Trainer) -> Undo:
    """Folders have the names of the next checkpoints."""
    per_epoch, folders = trainer.setting.steps_per_epoch, []
    first = trainer.last_step() // SAVE_EVERY + 2
    for number in range(first, first + 3):
        epoch, step = divmod(number * SAVE_EVERY, per_epoch)
        name = f"ckpt_epoch_{epoch}_step_{step}.pth" if step else f"ckpt_epoch_{epoch - 1}.pth"
        folders.append(trainer.folder / name)
        folders[-1].mkdir()

    def undo() -> None:
        for folder in folders:
            folder.rmdir()

    return undo


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A tmpfs of DISK_MB as ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)],
        check=True,
        capture_output=True,
    )
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)


def refusal(trainer: Trainer) -> str:
    """The reason that a save was refused with, if one was."""
    text = trainer.log_text() + trainer.text()
    return next((reason for reason in REFUSED if reason in text), "")


def refused_save(lab: Lab, name: str, refuse: Callable[[Trainer], Undo], trainer: Trainer) -> Row:
    """Saves are refused for a while; the file before stays, and in the end nothing is lost."""
    number = lab.rng.randrange(3 * SAVE_EVERY, trainer.setting.steps - 6 * SAVE_EVERY)
    trainer.launch()
    trainer.until_step(number)
    undo = refuse(trainer)
    try:
        deadline = time.monotonic() + 60
        while trainer.is_running and not refusal(trainer) and time.monotonic() < deadline:
            time.sleep(0.01)
        told = refusal(trainer)
        kept = {path: digest(path) for path in trainer.checkpoints()[:1] if storage.is_valid(path)}
        enough = trainer.last_step() + SAVE_EVERY  # one more is refused, and not that of the run's end
        while trainer.is_running and trainer.last_step() < enough and time.monotonic() < deadline:
            time.sleep(0.01)
        changed = [path.name for path, was in kept.items() if digest(path) != was]
    finally:
        undo()
    if changed or not kept or not told:
        raise FaultError(f"{name}: told {told!r}, older files {len(kept)}, changed {changed}")
    outcome = "older file kept, the run went on"
    if trainer.wait():
        outcome = f"older file kept, the run ended: {reason_of(trainer, told)}; then went on"
        trainer.launch()
        trainer.finish()
    verified = compare(trainer, lab.reference(trainer.setting)).require_none()
    where = f"{trainer.setting}{trainer.setting.notes}: after step {number}"
    return Row(name, where, outcome, trainer.launches - 1, trainer.redone, verified)


def reason_of(trainer: Trainer, told: str) -> str:
    """The last words of a run that ended, which must hold what the disk said; shortened."""
    words = trainer.last_words()
    if told not in words:
        raise FaultError(f"expected {told!r} as the reason, got: {words}")
    return "..." + words[words.index("expected") :]


def digest(path: Path) -> str:
    """Of a file's content; '' if it is gone."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def refusals(lab: Lab) -> list[Row]:
    """Every kind of disk that refuses to save, with and without saving in the background."""
    rows = []
    patient = Setting().with_options(SAVE_FAILURES_MAX=1000)
    for setting in (patient, patient.with_options(SAVE_ASYNC=False), Setting()):
        rows.append(refused_save(lab, "files limited (RLIMIT_FSIZE)", limit_files, lab.trainer(setting)))
    rows.append(refused_save(lab, "folder in the way", block_names, lab.trainer(Setting())))
    try:
        rows.append(refused_save(lab, "read-only folder", make_immutable, lab.trainer(Setting())))
    except (OSError, subprocess.CalledProcessError) as error:
        rows.append(Row("read-only folder", "", f"not tried here: {error}", None, None, ""))
    return rows


def full_disk(lab: Lab) -> list[Row]:
    """The run's folder lies on a small disk, which is filled to the last byte for a while."""
    rows = []
    for setting in (Setting().with_options(SAVE_FAILURES_MAX=1000), Setting()):
        trainer = lab.trainer(setting)
        try:
            with small_disk(trainer.folder.parent):
                rows.append(refused_save(lab, f"full disk (tmpfs of {DISK_MB} MB)", fill_disk, trainer))
        except (OSError, subprocess.CalledProcessError) as error:
            rows.append(Row("full disk", "", f"not tried here: {error}", None, None, ""))
    return rows


# --- Input and numbers --------------------------------------------------------------------------------------


def rotten_images(lab: Lab) -> list[Row]:
    """Training images are spoiled and deleted while the run reads them."""
    rows = []
    for setting in (Setting(1, 2), Setting(2, 0)):
        data = shutil.copytree(lab.data, lab.root / f"rotten_{setting.processes}")
        trainer = lab.trainer(setting, data)
        trainer.launch()
        trainer.until_step(setting.steps_per_epoch // 2)
        images = sorted((data / "train").glob("*/*.png"))
        spoiled = lab.rng.sample(images, 4)
        for image in spoiled[:2]:
            image.write_bytes(image.read_bytes()[: lab.rng.randrange(1, 60)])
        spoiled[2].write_bytes(b"")
        spoiled[3].unlink()
        trainer.finish()
        counted = [record["undecodable"] for record in metrics(trainer, "epoch")]
        logs = "".join(path.read_text() for path in trainer.folder.glob("log_rank*.txt"))
        unnamed = [image.name for image in spoiled if str(image) not in logs]
        if unnamed or counted[-1] != len(spoiled):
            raise FaultError(f"images {unnamed} are not in the log; {counted} were counted")
        outcome = "replaced and counted, the run went on"
        where = f"{setting}: 2 truncated, 1 emptied, 1 deleted in epoch 1"
        verified = f"each named in the log; {counted} counted by epoch"
        rows.append(Row("training images rot", where, outcome, 0, 0, verified))
    return rows


def bad_numbers(lab: Lab) -> list[Row]:
    """A learning rate that ruins the weights ends the run with the reason and a dump."""
    setting = Setting(options=(("TRAIN.BASE_LR", 1e30), ("TRAIN.CLIP_GRAD", 0), ("TRAIN.BAD_STEPS_MAX", 5)))
    trainer = lab.trainer(setting)
    trainer.launch()
    code, told = trainer.wait(), trainer.last_words()
    dump = trainer.folder / "bad_steps.json"
    steps = json.loads(dump.read_text())["steps"] if dump.exists() else []
    if (
        not code
        or "finite" not in told
        or len(steps) != 5
        or not all(batch["images"] for step in steps for batch in step["batches"])
    ):
        raise FaultError(f"exit code {code}, {len(steps)} steps in the dump: {told}")
    known = ", ".join(sorted(steps[0]))
    where = f"{setting}, learning rate 1e30, TRAIN.BAD_STEPS_MAX 5"
    outcome = f"exit code {code}; 'error: {told.partition(': ')[2][:120]}...'"
    return [Row("nan and inf", where, outcome, 0, None, f"{dump.name} tells of each step: {known}")]


# --- Saving in the background -------------------------------------------------------------------------------


def delays(lab: Lab) -> list[Row]:
    """How long a save holds training up, in the foreground and in the background, with a larger model."""
    return [held_up(lab), slowed_down(lab)]


def held_up(lab: Lab) -> Row:
    """How long the training loop waits in one call to save; what a busy machine takes away is not counted."""
    model = nn.Linear(WIDTH, WIDTH)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, WIDTH)).sum().backward()
    optimizer.step()
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    path, seconds = lab.root / "ckpt_epoch_0.pth", {}
    for background in (False, True):
        saver = AsyncCheckpointWriter(background, max_failures=1)
        times = []
        for _ in range(1 + ROUNDS):
            began = time.perf_counter()
            saver.submit(content, path, lambda copied: write_checkpoint(copied, path))
            times.append(time.perf_counter() - began)
            saver.wait()
        seconds[background] = statistics.median(times[1:])
    size, share = path.stat().st_size / 2**20, seconds[True] / seconds[False]
    path.unlink()
    outcome = (
        f"{size:.0f} MB: {1000 * seconds[False]:.0f} ms in the foreground, "
        f"{1000 * seconds[True]:.0f} ms in the background ({100 * share:.1f} %)"
    )
    how = f"medians of {ROUNDS}; at most 10 %"
    return Row("SAVE_ASYNC", "wait of the training loop", outcome, None, None, how, share <= 0.1)


def slowed_down(lab: Lab) -> Row:
    """What a save costs in whole runs: writing in the background takes processor time from a CPU's steps.

    Steps are taken in groups from one save to the next; the cost of a save is what a group lasts longer than
    one without a save, by the median.
    """
    base = Setting(options=(("SAVE_FREQ", 100), ("SAVE_KEEP", 1))).with_options(**BIG)
    groups, size = {}, 0.0
    for name, every, background in (("none", 0, False), ("plain", GROUP, False), ("async", GROUP, True)):
        trainer = lab.trainer(base.with_options(SAVE_STEPS=every, SAVE_ASYNC=background)).run()
        records = map(json.loads, (trainer.folder / "metrics.jsonl").read_text().splitlines())
        seconds = [BATCH_SIZE / record["img_per_s"] for record in records if record["kind"] == "train"]
        starts = range(2 * GROUP + 1, len(seconds) - GROUP, GROUP)  # the first ones warm up
        groups[name] = statistics.median(sum(seconds[start : start + GROUP]) for start in starts)
        size = max(path.stat().st_size for path in trainer.folder.glob("ckpt_*.pth")) / 2**20
    save, delay = groups["plain"] - groups["none"], groups["async"] - groups["none"]
    where = f"whole runs, a save every {GROUP} steps of {1000 * groups['none'] / GROUP:.0f} ms"
    costs = f"{1000 * save:.0f} ms in the foreground, {1000 * delay:.0f} ms in the background"
    how = "medians; busy processors included"
    return Row("SAVE_ASYNC", where, f"{size:.0f} MB: {costs}", None, None, how)
