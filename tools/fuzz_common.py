"""What the parts of tools/fuzz.py share: damage to bytes, the watch over what a check does, the verdict."""

import contextlib
import random
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

CANARY = "canary"
"""The file that hostile inputs try to write."""
MAX_MESSAGE = 20_000

_FORBIDDEN_EVENTS = (
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen"),
    *("socket.connect", "os.remove", "os.rename", "shutil.rmtree", "pty.spawn", "webbrowser.open"),
)
_WRITE_MODES = set("wax+")


@dataclass(frozen=True)
class Target:
    """Something that reads files, and how to attack it.

    Attributes:
        name: of the target.
        named: hostile cases by name; each writes its input into a folder and returns its path.
        mutated: writes a damaged input, drawn from a generator, and returns its kind and path.
        check: reads an input; returns if it accepts it, raises one of `errors` if it refuses it.
        errors: what a refusal may be.
        memory: bytes of address space that a check may take beyond what the process had.
    """

    name: str
    named: dict[str, Callable[[Path], Path]]
    mutated: Callable[[random.Random, Path], tuple[str, Path]]
    check: Callable[[Path], None]
    errors: tuple[type[Exception], ...]
    memory: int = 2**29

    def make(self, number: int, seed: int, folder: Path) -> tuple[str, Path]:
        """Input `number` as its kind and path: the named ones first, then damaged ones."""
        folder.mkdir(parents=True, exist_ok=True)
        names = list(self.named)
        if number < len(names):
            return names[number], self.named[names[number]](folder)
        return self.mutated(random.Random(f"{seed} {self.name} {number}"), folder)


@dataclass(frozen=True)
class Verdict:
    """What came of one input.

    Attributes:
        kind: of the input.
        outcome: accepted, refused or finding.
        detail: the message of the refusal, or what is wrong.
    """

    kind: str
    outcome: str
    detail: str = ""


class _Watch:
    """Notes what no reader of data may do: start programs, connect, write or remove files."""

    def __init__(self) -> None:
        self.armed = False
        self.seen: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        mode = arguments[1] if event == "open" and len(arguments) > 1 else ""
        if event in _FORBIDDEN_EVENTS or (isinstance(mode, str) and _WRITE_MODES & set(mode)):
            self.seen.append(f"{event} {arguments!r}"[:200])

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        self.seen, self.armed = [], True
        try:
            yield
        finally:
            self.armed = False


_watches: list[_Watch] = []  # one for the process: hooks of the interpreter stay for good


def watch() -> _Watch:
    """The process's watch."""
    if not _watches:
        _watches.append(_Watch())
        sys.addaudithook(_watches[0])
    return _watches[0]


def judge(target: Target, kind: str, path: Path) -> Verdict:
    """Let the target read an input, and say whether it behaved."""
    guard = watch()
    outcome, detail = "accepted", ""
    with guard.watching():
        try:
            target.check(path)
        except target.errors as error:
            outcome, detail = "refused", str(error)
        except Exception as error:
            outcome, detail = "finding", f"{type(error).__name__}: {error}"[:500]
    if outcome == "refused" and (f"{path.parent}/" not in detail or len(detail) > MAX_MESSAGE):
        outcome, detail = "finding", f"a message without the file's name, or an endless one: {detail[:300]!r}"
    if guard.seen or (path.parent / CANARY).exists() or (path.parent.parent / CANARY).exists():
        outcome, detail = "finding", f"something was run or written: {guard.seen}"
    return Verdict(kind, outcome, detail)


def limit_memory(extra: int) -> None:
    """Let this process take `extra` bytes of address space beyond what it has, and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


# --- Damage -------------------------------------------------------------------------------------------------

_NUMBERS = [
    value.to_bytes(length, order)
    for length in (2, 4, 8)
    for order in ("little", "big")
    for value in (0, 1, 2 ** (8 * length - 1) - 1, 2 ** (8 * length - 1), 2 ** (8 * length) - 1)
]


def damage(content: bytes, draw: random.Random, spots: tuple[int, ...] = ()) -> tuple[str, bytes]:
    """One to four random damages; `spots` are places worth hitting. Their kind, and the damaged bytes."""
    data = bytearray(content)
    kinds = []
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        kind = draw.choice(list(_DAMAGES))
        near = draw.choice([0, max(len(data) - 200, 0), *spots]) + draw.randrange(200)
        place = near if draw.random() < 0.6 else draw.randrange(len(data) + 1)
        _DAMAGES[kind](data, min(place, max(len(data) - 1, 0)), draw)
        kinds.append(kind)
    return "+".join(sorted(set(kinds))), bytes(data)


def _flip(data: bytearray, place: int, draw: random.Random) -> None:
    if data:
        data[place] ^= 1 << draw.randrange(8)


def _randomize(data: bytearray, place: int, draw: random.Random) -> None:
    data[place : place + 8] = draw.randbytes(min(8, len(data) - place))


def _truncate(data: bytearray, place: int, draw: random.Random) -> None:
    del data[place:]


def _drop(data: bytearray, place: int, draw: random.Random) -> None:
    del data[place : place + draw.choice((1, 2, 4, 16, 1000))]


def _insert(data: bytearray, place: int, draw: random.Random) -> None:
    data[place:place] = draw.randbytes(draw.choice((1, 2, 4, 16, 300)))


def _repeat(data: bytearray, place: int, draw: random.Random) -> None:
    length = draw.choice((4, 50, 1000))
    data[place:place] = data[place : place + length]


def _number(data: bytearray, place: int, draw: random.Random) -> None:
    value = draw.choice(_NUMBERS)
    data[place : place + len(value)] = value


def _zero(data: bytearray, place: int, draw: random.Random) -> None:
    length = min(draw.choice((4, 64, 2000)), len(data) - place)
    data[place : place + length] = bytes(length)


_DAMAGES: dict[str, Callable[[bytearray, int, random.Random], None]] = {
    "flip": _flip,
    "random": _randomize,
    "truncate": _truncate,
    "drop": _drop,
    "insert": _insert,
    "repeat": _repeat,
    "number": _number,
    "zero": _zero,
}


def write(path: Path, content: bytes | str) -> Path:
    """Write a file; its path."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path
