"""Hostile and broken files: each case with a name, a few random ones, and the fuzzer itself."""

import os
import sys
from pathlib import Path

import pytest
from conftest import REPO
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(REPO / "tools"))

import fuzz
import fuzz_common
import fuzz_images
import fuzz_text
from fuzz_common import CANARY, Target, judge, write

from config import MAX_FILES, MAX_YAML, load_config, parse_yaml
from data import EvalImages, TrainImages, UndecodableImageError
from data.images import MAX_PIXELS, decode_rgb
from data.maps import read_map
from data.source import FileSource
from data.transforms import eval_transform

CASES = [(target, number) for target in fuzz.TARGETS.values() for number in range(len(target.named))]
SLOW = ("endless", "a million keys", "base tree", "many keys")
"""Cases that the tool runs in a process with limited memory; they need more time than a test should."""
MUTATED = {"yaml": 20, "maps": 60, "archives": 60, "images": 10}
ACCEPTED = {
    "yaml": {"empty", "bom", "free section"},
    "maps": {"good", "crlf", "bom", "json", "json text"},
    "archives": {"good", "deflated", "with something before it", "zip64 as usual", "absolute path"},
    "images": {
        "jpeg",
        "cmyk",
        "16 bits",
        "exif 6",
        "animated gif",
        "one pixel",
        "65000 x 1 png",
        "icc broken",
    },
}
REFUSED = {  # and what the refusal says
    "yaml": {
        "tag os.system": "could not determine a constructor",
        "laughs": "got the alias *a0; write its value",
        "merges": "got the alias *m0; write its value",
        "duplicate keys": "line 3: key BATCH_SIZE stands there twice",
        "base loop": "expected no cycle",
        "base chain": f"expected at most {MAX_FILES} files",
        "nested lists": "too deeply nested",
        "huge hex as number": "expected a number, got a long int",
        "many levels": "FOCAL_LEVELS: expected 0 to 16",
        "many stages": "expected 1 to 16 stages, got 20000",
        "megabytes": f"expected text of at most {MAX_YAML:,} letters",
        "impossible date": "month must be in 1..12",
        "pipe": "no plain file",
    },
    "maps": {
        "parent": "expected a path inside the data set",
        "absolute": "expected a path relative to",
        "nul": "expected a path inside the data set",
        "empty line": "map.txt:2: expected a path and an integer label",
        "json float": "got the label 1.7",
        "json nested": "got invalid JSON",
        "not utf-8": "expected text in UTF-8, got byte 0xff at 0",
    },
    "archives": {
        "names twice": "expected every name once, got 'ant/0.png' 2 times",
        "encrypted": "with encryption",
        "bomb": "of at most 256 MiB, got 314572800 bytes",
        "bomb that claims a byte": "its size or checksum is wrong",
        "zip64 beyond 63 bits": "inside its archive",
        "archive outside": "without '..'",
        "absolute archive": "expected an archive beside the map",
        "nested path": "no such member",
    },
    "images": {
        "png claims": "could be decompression bomb",
        "png of 2**27 pixels": f"expected 1 to {MAX_PIXELS:,} pixels, got 16384 x 8192",
        "png of one row": "pixels, got 67108865 x 1",
        "postscript": "cannot identify image file",
        "svg": "cannot identify image file",
        "half": "truncated",
        "sparse": "at most 256 MiB, got a larger one",
        "pipe": "no plain file",
        "device": "no plain file",
        "missing": "No such file",
    },
}


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_no_case_misbehaves(name: str, tmp_path: Path) -> None:
    """Those with a name, and the first random ones; what is accepted and why others are refused."""
    target = fuzz.TARGETS[name]
    verdicts = {}
    for number in range(len(target.named) + MUTATED[name]):
        if number < len(target.named) and list(target.named)[number].split(": ")[-1].startswith(SLOW):
            continue
        kind, path = target.make(number, 0, tmp_path / str(number) / "in")
        verdict = judge(target, kind, path)
        assert verdict.outcome != "finding", f"{number} {verdict}"
        verdicts.setdefault(kind, verdict)
    wrong = {kind: verdicts[kind] for kind in ACCEPTED[name] if verdicts[kind].outcome != "accepted"}
    assert not wrong
    for kind, words in REFUSED[name].items():
        assert verdicts[kind].outcome == "refused" and words in verdicts[kind].detail, verdicts[kind]


# --- The fuzzer finds what it looks for ---------------------------------------------------------------------


def _misbehaving(kind: str) -> Target:
    """A target whose checks do what they must not."""

    def check(path: Path) -> None:
        {
            "another error": lambda: 1 // 0,
            "no name": lambda: _raise(ValueError("no")),
            "a program": lambda: os.system("true"),
            "a file": lambda: (path.parent / CANARY).write_text("x"),
            "a death": lambda: os._exit(3),
            "memory": lambda: len(bytes(2**30)),
            "nothing": lambda: None,
        }[kind if path.name != "warm-up" else "nothing"]()

    def make(folder: Path) -> Path:
        return write(folder / ("warm-up" if folder.name == "warm-up" else "input"), b"")

    return Target(
        "bad", {"case": make}, lambda draw, folder: ("any", make(folder)), check, (ValueError,), 2**28
    )


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("another error", "ZeroDivisionError"),
        ("no name", "without the file's name"),
        ("a program", "os.system"),
        ("a file", "canary"),
        ("a death", "died with status 3"),
        ("memory", "MemoryError"),
        ("nothing", ""),
    ],
)
def test_the_fuzzer_finds(kind: str, words: str, tmp_path: Path) -> None:
    tally = fuzz.fuzz(_misbehaving(kind), 2, 0, tmp_path)
    assert sum(tally.outcomes.values()) == 2
    assert len(tally.findings) == (2 if words else 0)
    assert all(words in finding for finding in tally.findings)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tools/fuzz.py", "--targets", "maps"])
    assert fuzz.main(["--targets", "maps", "--count", "60", "--out", str(tmp_path)]) == 0
    assert "| maps | 60 |" in next(tmp_path.glob("*_fuzz.md")).read_text()
    monkeypatch.setitem(fuzz.TARGETS, "maps", _misbehaving("another error"))
    assert fuzz.main(["--targets", "maps", "--count", "2"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_inputs_follow_from_seed_and_number(tmp_path: Path) -> None:
    for target in fuzz.TARGETS.values():
        number = len(target.named) + 3
        made = [
            target.make(number, seed, tmp_path / target.name / str(i)) for i, seed in enumerate((1, 1, 2))
        ]
        contents = [path.read_bytes() for _, path in made]
        assert contents[0] == contents[1]


# --- Properties ---------------------------------------------------------------------------------------------

SOME = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.dates(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
SECTIONS = st.sampled_from(["DATA", "MODEL", "TRAIN", "AUG", "SEED", "TAG", "BASE", "MODEL.FOCAL"])


@SOME
@given(content=st.dictionaries(SECTIONS, PLAIN, max_size=4))
def test_any_yaml_is_a_config_or_a_list_of_problems(content: dict, tmp_path: Path) -> None:
    import yaml

    path = write(tmp_path / "input.yaml", yaml.safe_dump(content, allow_unicode=True))
    try:
        load_config(path)
    except ValueError as error:
        assert str(path) in str(error)


@SOME
@given(value=PLAIN)
def test_plain_values_come_back_from_yaml(value: object) -> None:
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: object) -> bool:
            return True

    text = yaml.dump(value, Dumper=Dumper)
    assert repr(parse_yaml(text)) == repr(yaml.safe_load(text))


@SOME
@given(text=st.text(st.characters(codec="utf-8"), max_size=60), tail=st.sampled_from(["", "\t0", "\t1\n"]))
def test_any_map_line_is_read_or_named(text: str, tail: str, tmp_path: Path) -> None:
    path = write(tmp_path / "map.txt", text + tail)
    try:
        image_map = read_map(path, 3)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert all(0 <= label < 3 for label in image_map.labels)
        assert not any(".." in name.split("/") or "\0" in name for name in image_map.names)


@SOME
@given(
    content=st.binary(max_size=300),
    start=st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a"]),
)
def test_any_bytes_are_an_image_or_named(content: bytes, start: bytes) -> None:
    try:
        image = decode_rgb(start + content, "some/image.jpg")
    except UndecodableImageError as error:
        assert str(error).startswith("some/image.jpg: ")
    else:
        assert image.mode == "RGB" and image.width * image.height <= MAX_PIXELS


# --- Bounds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(400, 3), (3, 400), (40_000, 2)])
def test_a_line_of_pixels_shows_its_middle(shape: tuple[int, int]) -> None:
    """The ends that no crop shows are cut off first; the middle is what a whole resize would show."""
    image = fuzz_images.picture(*shape)
    transform = eval_transform((48, 64), 3, (0, 0, 0), (1, 1, 1), "bilinear", crop=True)
    assert transform(image).shape == (3, 48, 64)
    height, width = shape
    middle = image.crop(
        (max(width // 2 - 40, 0), max(height // 2 - 40, 0), width // 2 + 40, height // 2 + 40)
    )
    expected = transform(middle.crop((0, 0, min(width, 80), min(height, 80))))
    assert (transform(image) - expected).abs().mean() < 0.02


def test_one_bad_training_image_is_replaced_whatever_it_is(tmp_path: Path) -> None:
    """Files that cannot be read as well; in evaluation they are errors."""
    write(tmp_path / "good.jpg", fuzz_images.encoded("JPEG"))
    write(tmp_path / "gone.jpg", b"")
    source = FileSource(tmp_path, ["gone.jpg", "good.jpg"], [0, 1])
    (tmp_path / "gone.jpg").unlink()
    transform = eval_transform((48, 64), 3, (0, 0, 0), (1, 1, 1), "bilinear", crop=True)
    images = TrainImages(source, transform, 0)
    assert images[(0, 0)][1] == 1
    assert images.undecodable == 1
    with pytest.raises(OSError, match="gone.jpg"):
        EvalImages(source, transform)[0]


def test_links_in_a_circle_list_images_once(tmp_path: Path) -> None:
    from data.folder import scan_class_folders

    (tmp_path / "ant" / "more").mkdir(parents=True)
    write(tmp_path / "ant" / "more" / "0.jpg", b"")
    for name in ("loop", "again"):
        (tmp_path / "ant" / "more" / name).symlink_to(tmp_path / "ant")
    assert len(scan_class_folders(tmp_path)[1]) == 1


def test_targets_have_names_of_their_own() -> None:
    assert len(CASES) == sum(len(target.named) for target in fuzz.TARGETS.values()) > 200
    assert fuzz_text.CLASSES and fuzz_common.REPO == REPO
