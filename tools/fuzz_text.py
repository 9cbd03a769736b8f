"""Hostile yaml files and map files for tools/fuzz.py."""

import json
import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fuzz_common import CANARY, REPO, Target, damage, write

from config import load_config
from data.folder import read_map_of_files

Case = Callable[[Path], Path]
CLASSES = 3
MAX_DUMP = 2**18


def _text(content: bytes | str, name: str) -> Case:
    return lambda folder: write(folder / name, content)


# --- Yaml ---------------------------------------------------------------------------------------------------

_LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
_MERGES = "m0: &m0 {k: 1}\n" + "".join(f"m{n}: &m{n}\n  <<: [*m{n - 1}, *m{n - 1}]\n" for n in range(1, 40))
_TAGS = {
    "os.system": "!!python/object/apply:os.system ['touch {}']",
    "new": "!!python/object/new:os.system ['touch {}']",
    "module": "!!python/module:antigravity",
    "name": "!!python/name:os.system",
    "tuple": "!!python/tuple [1, 2]",
    "int": "!!int x",
    "float": "!!float x",
    "bool": "!!bool x",
    "timestamp": "!!timestamp x",
    "binary": "!!binary '###'",
    "set": "!!set {{1, 2}}",
    "omap": "!!omap [1]",
    "null": "!!null x",
    "own": "!secret x",
}
_VALUES = {
    "nan": "TRAIN: {BASE_LR: .nan}",
    "inf": "TRAIN: {BASE_LR: .inf}",
    "huge float": "TRAIN: {BASE_LR: 1e999}",
    "huge hex as number": f"TRAIN: {{BASE_LR: 0x{'f' * 5000}}}",
    "huge hex": f"DATA: {{BATCH_SIZE: 0x{'f' * 5000}}}",
    "huge integer": f"DATA: {{BATCH_SIZE: {'9' * 5000}}}",
    "huge integer as text": f"DATA: {{BATCH_SIZE: '{'9' * 900}'}}",
    "sexagesimal": f"DATA: {{BATCH_SIZE: {':'.join(['1'] * 3000)}}}",
    "date": "DATA: {BATCH_SIZE: 2001-01-01}",
    "impossible date": "DATA: {BATCH_SIZE: 2001-99-99}",
    "brackets in text": f"DATA: {{MEAN: '{'[' * 900}'}}",
    "signs in text": f"DATA: {{MEAN: '{'-' * 900}1'}}",
    "nested lists": f"DATA: {{MEAN: {'[' * 20000}}}",
    "nested dicts": "".join(" " * n + "a:\n" for n in range(300)),
    "many levels": "MODEL: {FOCAL: {FOCAL_POOL: fc, FOCAL_LEVELS: [4000000000, 1, 1, 1]}}",
    "many stages": f"MODEL: {{FOCAL: {{DEPTHS: {[1] * 20000}}}}}",
    "a million keys": "".join(f"k{n}: 1\n" for n in range(10**6)),
    "many keys": "".join(f"k{n}: 1\n" for n in range(5000)),
    "endless key": f"? {'k' * 60000}\n: 1",
    "odd keys": "? 1\n: 2\nnull: 3\n? 2001-01-01\n: 4\ntrue: 5\n1.5: 6",
    "list as key": "? [1, 2]\n: 3",
    "duplicate keys": "DATA:\n  BATCH_SIZE: 1\n  BATCH_SIZE: 2",
    "duplicate sections": "DATA: {}\nDATA: {BATCH_SIZE: 2}",
    "list at the top": "[1, 2]",
    "number at the top": "7",
    "empty": "",
    "two documents": "a: 1\n---\nb: 2",
    "section is a list": "DATA: [1]",
    "value is a section": "SEED: {A: 1}",
    "free section": "MODEL: {SPEC: {a: {b: [1, 2]}}}",
    "free section is a list": "MODEL: {SPEC: [1, 2]}",
    "cycle in values": "DATA: {MEAN: &a [*a]}",
    "control characters": 'MODEL: {TYPE: "\\e[2J\\0evil"}',
    "base is a dict": "BASE: {a: 1}",
    "base is missing": "BASE: [no.yaml]",
    "base is itself": "BASE: [input.yaml]",
    "base is a folder": "BASE: ['.']",
    "base has nul": 'BASE: ["a\\0b.yaml"]',
    "base is endless": f"BASE: ['{'a' * 5000}']",
    "base is a device": "BASE: [/dev/zero]",
    "base twice many times": f"BASE: {['empty.yaml'] * 1000}",
    "laughs": _LAUGHS + "DATA: {BATCH_SIZE: *a39}",
    "merges": _MERGES,
}
_CONTENTS = {
    "not utf-8": b"DATA: {DATA_PATH: '\xff\xfe'}",
    "utf-16": "SEED: 1".encode("utf-16"),
    "bom": b"\xef\xbb\xbfSEED: 1",
    "nul": b"SEED: 1\0",
    "zeros": bytes(5000),
    "megabytes": b"#" * 2**25,
}


def _base_tree(folder: Path) -> Path:
    """Thirty files, each of which names the next one twice: a thousand million to merge."""
    for number in range(30):
        write(folder / f"{number}.yaml", f"BASE: [{number + 1}.yaml, {number + 1}.yaml]")
    write(folder / "30.yaml", "SEED: 1")
    return folder / "0.yaml"


def _base_loop(folder: Path) -> Path:
    write(folder / "a.yaml", "BASE: [b.yaml]")
    write(folder / "b.yaml", "BASE: [a.yaml]")
    return folder / "a.yaml"


def _base_chain(folder: Path) -> Path:
    for number in range(3000):
        write(folder / f"{number}.yaml", f"BASE: [{number + 1}.yaml]")
    return folder / "0.yaml"


def _folder(folder: Path) -> Path:
    (folder / "folder.yaml").mkdir()
    return folder / "folder.yaml"


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.yaml")
    return folder / "pipe.yaml"


def _link_loop(folder: Path) -> Path:
    (folder / "loop.yaml").symlink_to("loop.yaml")
    return folder / "loop.yaml"


def yaml_cases() -> dict[str, Case]:
    """Yaml files by name."""
    cases: dict[str, Case] = {}
    for name, tag in _TAGS.items():
        cases[f"tag {name}"] = lambda folder, tag=tag: write(
            folder / "input.yaml", f"DATA: {{DATA_PATH: {tag.format(folder / CANARY)}}}"
        )
    for name, content in (_VALUES | _CONTENTS).items():
        cases[name] = _text(content, "input.yaml")
    cases |= {"base tree": _base_tree, "base loop": _base_loop, "base chain": _base_chain}
    cases |= {"folder": _folder, "pipe": _pipe, "link loop": _link_loop}
    return cases | {"missing": lambda folder: folder / "no.yaml"}


def check_yaml(path: Path) -> None:
    """Load the file; what is accepted must be frozen and printable as yaml."""
    config = load_config(path)
    if not config.is_frozen() or len(config.dump()) > MAX_DUMP:
        raise RuntimeError("a config that is not frozen, or endless")


_YAMLS = [path.read_bytes() for path in sorted((REPO / "configs").glob("*.yaml"))]
_WORDS = (
    *(
        "&a ",
        "*a",
        "<<: ",
        "!!",
        "? ",
        "- ",
        "[",
        "]",
        "{",
        "}",
        "'",
        '"',
        "|",
        ">",
        "%YAML 9.9",
        "---",
        "...",
    ),
    *(
        "null",
        "~",
        ".nan",
        "0x",
        "1e999",
        "BASE: ",
        "DATA: ",
        "MODEL:\n  FOCAL:\n",
        "\t",
        "\r",
        "\x85",
        "\ufeff",
    ),
)


def mutated_yaml(draw: random.Random, folder: Path) -> tuple[str, Path]:
    """A config of the project with damaged bytes, or with words of yaml in odd places."""
    base = draw.choice(_YAMLS)
    if draw.random() < 0.5:
        kind, content = damage(base, draw)
    else:
        text = base.decode()
        for _ in range(draw.randrange(1, 6)):
            place = draw.randrange(len(text) + 1)
            text = text[:place] + draw.choice(_WORDS) + text[place + draw.choice((0, 0, 1, 5)) :]
        kind, content = "words", text.encode()
    return kind, write(folder / "input.yaml", content)


YAML = Target("yaml", yaml_cases(), mutated_yaml, check_yaml, (ValueError,))


# --- Maps ---------------------------------------------------------------------------------------------------

_MAP_LINES = {
    "good": "a.png\t0\nb.png\t1",
    "crlf": "a.png\t0\r\nb.png\t1\r\n",
    "bom": "\ufeffa.png\t0",
    "empty": "",
    "blank": "\n \n\t\n",
    "empty line": "a.png\t0\n\nb.png\t1",
    "missing field": "a.png",
    "empty name": "\t0",
    "extra field": "a.png\t0\t1",
    "negative": "a.png\t-1",
    "too large": "a.png\t3",
    "text": "a.png\tcat",
    "float": "a.png\t1.5",
    "underscore": "a.png\t1_0",
    "other digits": "a.png\t\u0663",
    "huge": f"a.png\t{'9' * 5000}",
    "huge with zeros": f"a.png\t{'0' * 50000}1",
    "parent": "../../../etc/passwd\t0",
    "parent inside": "a/../../b.png\t0",
    "parent with backslashes": "a\\..\\..\\b.png\t0",
    "absolute": "/etc/passwd\t0",
    "home": "~/a.png\t0",
    "nul": "a\0.png\t0",
    "escape": "\x1b[2Ja.png\t0",
    "right to left": "\u202egnp.a\t0",
    "long name": f"{'a' * 5000}.png\t0",
    "long path": f"{'a/' * 5000}b.png\t0",
    "endless line": "a" * 2**24,
    "folder": ".\t0",
    "missing": "no.png\t0",
    "json": '[["a.png", 0]]',
    "json broken": '[["a.png", 0',
    "json empty": "[]",
    "json nested": "[" * 10**5,
    "json bool": '[["a.png", true]]',
    "json float": '[["a.png", 1.7]]',
    "json nan": '[["a.png", NaN]]',
    "json text": '[["a.png", "1"]]',
    "json huge": f'[["a.png", {"9" * 5000}]]',
    "json huge exponent": '[["a.png", 1e999]]',
    "json name is a number": "[[1, 0]]",
    "json name is a dict": '[[{"a": 1}, 0]]',
    "json surrogate": '[["\\ud800.png", 0]]',
    "json nul": '[["a\\u0000.png", 0]]',
    "json newline": '[["a\\n.png", 0]]',
    "json parent": '[["../a.png", 0]]',
    "json entry is text": '["a.png"]',
    "json after it": '[["a.png", 0]] more',
}
_MAP_CONTENTS = {"not utf-8": b"\xff\xfe\t0", "utf-16": "a.png\t0".encode("utf-16"), "zeros": bytes(500)}


def _mapped(content: bytes | str) -> Case:
    def make(folder: Path) -> Path:
        for name in ("a.png", "b.png", "c.png"):
            write(folder / name, b"")
        return write(folder / "map.txt", content)

    return make


def check_map(path: Path) -> None:
    """Read the map; what is accepted has labels in range and stays in its folder."""
    source = read_map_of_files(path.parent, path.name, CLASSES)
    for index in range(len(source)):
        inside = os.path.normpath(source.name(index)).startswith(f"{path.parent}{os.sep}")
        if not (inside and 0 <= source.labels[index] < CLASSES):
            raise RuntimeError(f"accepted {source.name(index)!r} with label {source.labels[index]}")
        source.read(index)


_MAPS = [
    "\n".join(f"{name}.png\t{label}" for name in "abc" for label in range(3)).encode(),
    json.dumps([[f"{name}.png", label] for name in "abc" for label in range(3)]).encode(),
]


def mutated_map(draw: random.Random, folder: Path) -> tuple[str, Path]:
    """A good map, damaged."""
    kind, content = damage(draw.choice(_MAPS), draw)
    return kind, _mapped(content)(folder)


MAPS = Target(
    "maps",
    {name: _mapped(content) for name, content in (_MAP_LINES | _MAP_CONTENTS).items()}
    | {"no file": partial(lambda folder: folder / "map.txt")},
    mutated_map,
    check_map,
    (ValueError, FileNotFoundError),
)
