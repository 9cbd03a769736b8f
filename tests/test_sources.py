"""Every source of images gives what class folders give, bit for bit, and names what is wrong with it."""

import importlib.util
import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from test_data import (
    CLASSES,
    COUNTS,
    draw_epoch,
    make_config,
    raises,
    split_images,
    val_set,
    write_folder,
    write_in22k,
    write_zip,
)
from yacs.config import CfgNode

from data import Loaders, UndecodableImageError, archive, build_loaders
from data.folder import SOLUTION
from data.shards import open_shards

Options = dict[str, object]


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The library datasets neither asks the network nor writes to the home folder."""
    if importlib.util.find_spec("datasets") is None:
        return
    import datasets

    datasets.config.HF_HUB_OFFLINE = True
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders in train/ and val/."""
    return write_folder(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def expected(plain: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images and labels of an epoch, and of the evaluation, from class folders."""
    loaders = build_loaders(make_config(plain))
    return *draw_epoch(loaders, 2), *val_set(loaders)


# --- Writing the same images in other layouts ---------------------------------------------------------------


def write_folders(plain: Path, root: Path, val: str) -> None:
    shutil.copytree(plain / "train", root / "train")
    shutil.copytree(plain / "val", root / val)


def write_kaggle(plain: Path, root: Path) -> None:
    """ImageNet as Kaggle packs it; in its flat folder the images of a class are scattered."""
    home = root / "ILSVRC" / "Data" / "CLS-LOC"
    shutil.copytree(plain / "train", home / "train")
    (home / "val").mkdir()
    lines = ["ImageId,PredictionString"]
    for path, label, _ in split_images("val"):
        image = f"ILSVRC2012_val_{int(Path(path).stem) * len(CLASSES) + label:08d}"
        shutil.copy(plain / "val" / path, home / "val" / f"{image}.JPEG")
        lines.append(f"{image},{CLASSES[label]} 111 108 365 342 {CLASSES[label]} 1 2 3 4 ")
    (root / SOLUTION).write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")


def link_kaggle(plain: Path, root: Path) -> None:
    """A symbolic link to its innermost folder, far from the solution."""
    write_kaggle(plain, root.parent / "kaggle")
    root.symlink_to(root.parent / "kaggle/ILSVRC/Data/CLS-LOC")


def add(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    shard.addfile(member, io.BytesIO(content))


def write_shards(plain: Path, root: Path, pattern: str, as_json: bool = False) -> None:
    """Tar shards of five samples each; `pattern` has fields for the split and the number of the shard."""
    for split in COUNTS:
        samples = list(split_images(split))
        for number in range(0, len(samples), 5):
            path = root / pattern.format("validation" if split == "val" else split, number // 5)
            path.parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(path, "w") as shard:
                add(shard, "__info__.json", b'{"about": "the shard"}')
                for name, label, _ in samples[number : number + 5]:
                    key = f"images.v1/{name.removesuffix('.png')}"
                    text = json.dumps({"label": label, "name": name}) if as_json else f"{label}\n"
                    add(shard, f"{key}.{'json' if as_json else 'cls'}", text.encode())
                    add(shard, f"{key}.PNG" if as_json else f"{key}.png", (plain / split / name).read_bytes())


def make_rows(plain: Path, split: str, image: str = "image", label: str = "label"):
    datasets = pytest.importorskip("datasets")
    samples = list(split_images(split))
    features = {
        "id": datasets.Value("int64"),
        image: datasets.Image(),
        label: datasets.ClassLabel(names=list(CLASSES)),
    }
    columns = {
        "id": list(range(len(samples))),
        image: [{"bytes": (plain / split / path).read_bytes(), "path": None} for path, _, _ in samples],
        label: [label for _, label, _ in samples],
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def write_disk(plain: Path, root: Path) -> None:
    datasets = pytest.importorskip("datasets")
    splits = {"train": make_rows(plain, "train"), "validation": make_rows(plain, "val")}
    datasets.DatasetDict(splits).save_to_disk(str(root))


def write_disk_folders(plain: Path, root: Path) -> None:
    """Each split saved on its own, in an order that only the library knows, with names of its own."""
    for split in COUNTS:
        count = len(list(split_images(split)))
        backwards = make_rows(plain, split, "pic", "digit").select(range(count - 1, -1, -1))
        backwards.select(range(count - 1, -1, -1)).save_to_disk(str(root / f"my_{split}"))


def write_parquet(plain: Path, root: Path) -> None:
    (root / "data").mkdir(parents=True)
    for split, name in (("train", "train"), ("val", "validation")):
        make_rows(plain, split).to_parquet(root / "data" / f"{name}-00000-of-00001.parquet")


def write_plain_parquet(plain: Path, root: Path) -> None:
    """As pandas would write it: no features of the library, paths instead of content."""
    pytest.importorskip("datasets")
    import pyarrow
    from pyarrow import parquet

    root.mkdir()
    for split in COUNTS:
        samples = list(split_images(split))
        files = [{"bytes": None, "path": str(plain / split / path)} for path, _, _ in samples]
        column = pyarrow.array(files, pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}))
        labels = pyarrow.array([label for _, label, _ in samples], pyarrow.int16())
        parquet.write_table(pyarrow.table({"img": column, "labels": labels}), root / f"{split}.parquet")


HF_NAMES = {
    **{"DATA__HF__IMAGE_COLUMN": "pic", "DATA__HF__LABEL_COLUMN": "digit"},
    **{"DATA__HF__TRAIN_SPLIT": "my_train", "DATA__HF__VAL_SPLIT": "my_val"},
}
WDS, HF, ZIP = {"DATA__DATASET": "wds"}, {"DATA__DATASET": "hf"}, {"DATA__ZIP_MODE": True}
IN22K = {"DATA__DATASET": "imagenet22k"}


def write_maps(plain: Path, root: Path, as_json: bool) -> None:
    shutil.copytree(plain, root)
    write_in22k(root, as_json)


LAYOUTS: dict[str, tuple[Callable[[Path, Path], object], Options]] = {
    "validation": (partial(write_folders, val="validation"), {}),
    "test": (partial(write_folders, val="test"), {"DATA__DATASET": "folder"}),
    "kaggle": (write_kaggle, {}),
    "kaggle linked": (link_kaggle, {}),
    "zip": (partial(write_zip, method=zipfile.ZIP_DEFLATED), ZIP),
    "zip with names in the map": (partial(write_zip, prefix="{}.zip@/"), ZIP),
    "maps": (partial(write_maps, as_json=False), IN22K),
    "maps in json": (partial(write_maps, as_json=True), IN22K | {"MODEL__NUM_CLASSES": 21841}),
    "shards in folders": (partial(write_shards, pattern="{}/{:03d}.tar"), WDS),
    "shards side by side": (partial(write_shards, pattern="in1k-{}-{:04d}.tar", as_json=True), WDS),
    "saved": (write_disk, HF),
    "saved splits": (write_disk_folders, HF | HF_NAMES),
    "parquet": (write_parquet, HF),
    "plain parquet": (write_plain_parquet, HF),
}


@pytest.fixture(params=LAYOUTS)
def config(request: pytest.FixtureRequest, plain: Path, tmp_path: Path) -> CfgNode:
    """The configuration of one layout, which it writes."""
    write, options = LAYOUTS[request.param]
    write(plain, tmp_path / "data")
    return make_config(tmp_path / "data", OUTPUT=str(tmp_path / "output"), **options)


def test_a_source_equals_class_folders(config: CfgNode, expected: tuple[torch.Tensor, ...]) -> None:
    """In training, resumed, with another number of processes, and in evaluation; in workers of both kinds."""
    alone = build_loaders(config)
    for ours, theirs in zip((*draw_epoch(alone, 2), *val_set(alone)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    resumed = [build_loaders(config, rank, 2) for rank in range(2)]
    steps = [draw_epoch(loaders, 2, samples_seen=8)[0].split(4) for loaders in resumed]
    rest = torch.cat([batch for step in zip(*steps, strict=True) for batch in step])
    torch.testing.assert_close(rest, expected[0][8:16], rtol=0, atol=0)
    shares = torch.cat([val_set(loaders)[0] for loaders in resumed]).flatten(1)
    assert torch.equal(torch.unique(shares, dim=0), torch.unique(expected[2].flatten(1), dim=0))
    assert len(shares) == len(expected[2])

    config.defrost()
    config.DATA.NUM_WORKERS = 1
    forked = build_loaders(config)
    forked.val_dataset[0]  # whatever a source opens is open before the worker starts
    torch.testing.assert_close(val_set(forked)[0], expected[2], rtol=0, atol=0)
    source = pickle.loads(pickle.dumps(forked.val_dataset.source))  # as a spawned worker receives it
    assert [source.read(i) for i in range(9)] == [alone.val_dataset.source.read(i) for i in range(9)]


# --- Class folders and Kaggle's ImageNet --------------------------------------------------------------------


def test_val_comes_before_test(plain: Path, tmp_path: Path, expected: tuple[torch.Tensor, ...]) -> None:
    write_folders(plain, tmp_path / "data", "val")
    (tmp_path / "data" / "test").mkdir()
    assert torch.equal(val_set(build_loaders(make_config(tmp_path / "data")))[0], expected[2])


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda lines: lines.pop(3), ("csv: expected a line for every image", "ILSVRC2012_val")),
        (lambda lines: lines.append("other,ant 1 2"), ("csv: expected a line for every image", "other")),
        (lambda lines: lines.insert(2, "x,"), ("csv:3: expected '<image>,<class> <box>'", "'x,'")),
    ],
    ids=["missing line", "missing image", "no class"],
)
def test_bad_solutions_of_kaggle(
    change: Callable[[list[str]], object], parts: tuple[str, ...], plain: Path, tmp_path: Path
) -> None:
    write_kaggle(plain, tmp_path)
    lines = (tmp_path / SOLUTION).read_text().splitlines()
    change(lines)
    (tmp_path / SOLUTION).write_text("\n".join(lines))
    with raises(ValueError, *parts):
        build_loaders(make_config(tmp_path))


def test_kaggles_images_need_its_solution(plain: Path, tmp_path: Path) -> None:
    write_kaggle(plain, tmp_path)
    (tmp_path / SOLUTION).unlink()
    with raises(ValueError, "val: expected one sub-folder", "LOC_val"):
        build_loaders(make_config(tmp_path))


# --- Archives -----------------------------------------------------------------------------------------------


def test_more_archives_than_a_process_may_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MOST_OPEN", 2)
    for number in range(4):
        with zipfile.ZipFile(tmp_path / f"{number}.zip", "w") as file:
            file.writestr("a.png", str(number))
    (tmp_path / "train_map.txt").write_text("".join(f"{n}.zip@/a.png\t{n}\n" for n in range(4)))
    source = archive.open_archive_split(tmp_path, "train")
    assert [source.read(n) for n in (0, 1, 2, 0, 3)] == [b"0", b"1", b"2", b"0", b"3"]
    assert len(source._files) <= 2


# --- Shards -------------------------------------------------------------------------------------------------


def shard_of(*files: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as shard:
        for name, content in files:
            add(shard, name, content)
    return buffer.getvalue()


def linked() -> bytes:
    """A shard with a second name of its image, as tar stores files that are hard links."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as shard:
        add(shard, "a.jpg", b"x")
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "a.jpg"
        shard.addfile(link)
    return buffer.getvalue()


def open_shard(folder: Path, *contents: bytes) -> None:
    (folder / "train").mkdir(parents=True)
    for number, content in enumerate(contents):
        (folder / "train" / f"{number}.tar").write_bytes(content)
    open_shards(folder, "train", folder / "output")


IMAGE, LABEL = ("a/0.jpg", b"\xff" * 700), ("a/0.cls", b"1")
WHOLE = shard_of(IMAGE, LABEL)
BAD_SHARDS = {
    "link": (linked(), "b.jpg is a sparse file or a link"),
    "cut in an image": (WHOLE[:700], "0.tar: expected a whole tar file"),
    "cut between images": (WHOLE[:1536], "0.tar: expected a whole tar file"),
    "compressed": (b"\x1f\x8b" + bytes(2000), "0.tar: expected a whole tar file without compression"),
    "no image": (shard_of(), "0.tar: expected images"),
    "no label": (shard_of(IMAGE), "0.tar@/a/0.jpg: expected its label"),
    "label alone": (shard_of(IMAGE, ("b/0.cls", b"1")), "0.tar@/b/0: expected an image"),
    "label in words": (shard_of(IMAGE, ("a/0.cls", b"one")), "a/0.jpg: expected its label"),
    "no label in json": (shard_of(IMAGE, ("a/0.json", b'{"class": 1}')), "a/0.jpg: expected its label"),
    "image twice": (shard_of(IMAGE, LABEL, IMAGE), "a/0.jpg: expected one image and one label"),
    "dots in keys": (shard_of(("b.v2.jpg", b""), ("b.v2.cls", b"1")), "@/b.v2.jpg: expected an image named"),
}


@pytest.mark.parametrize("name", BAD_SHARDS)
def test_bad_shards(name: str, tmp_path: Path) -> None:
    content, message = BAD_SHARDS[name]
    with raises(ValueError, message):
        open_shard(tmp_path, content)
    assert not list(tmp_path.rglob("*.npz"))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The tar files that are opened from now on; each takes a moment."""
    files: list[object] = []
    open_tar = tarfile.open

    def count_and_open(*args: object, **options: object) -> tarfile.TarFile:
        files.extend(args[:1])
        time.sleep(0.05)
        return open_tar(*args, **options)

    monkeypatch.setattr(tarfile, "open", count_and_open)
    return files


def test_one_of_the_processes_that_start_together_indexes(tmp_path: Path, opened: list[object]) -> None:
    (tmp_path / "train-0.tar").write_bytes(WHOLE)
    with ThreadPoolExecutor() as pool:
        starts = [pool.submit(open_shards, tmp_path, "train", tmp_path / "output") for _ in range(4)]
    assert [start.result().labels.tolist() for start in starts] == [[1]] * 4
    assert len(opened) == 1


def test_missing_shards(tmp_path: Path) -> None:
    (tmp_path / "train-0.tar.gz").touch()
    (tmp_path / "interval-0.tar").touch()
    with raises(FileNotFoundError, "expected *.tar, not compressed", "called train", "got interval-0.tar"):
        open_shards(tmp_path, "train", tmp_path)
    with raises(FileNotFoundError, "val or validation or test as a word of the file name"):
        open_shards(tmp_path, "val", tmp_path)


@pytest.mark.parametrize("can_write", [True, False])
def test_the_index_is_kept_until_a_shard_changes(
    can_write: bool, tmp_path: Path, opened: list[object]
) -> None:
    """Beside the shards, or in the output folder if it cannot be written there."""
    shard, output = tmp_path / "train-0.tar", tmp_path / "output"
    if not can_write:
        (tmp_path / "index_train.npz").mkdir()
    shard.write_bytes(shard_of(IMAGE, LABEL, ("a/0.mask.png", b""), ("a/README", b"")))
    for _ in range(2):
        source = open_shards(tmp_path, "train", output)
        assert (len(opened), source.labels.tolist(), source.read(0)) == (1, [1], IMAGE[1])
    shard.write_bytes(shard_of(IMAGE, ("a/0.cls", b"2")))
    os.utime(shard, (1, 1))
    assert open_shards(tmp_path, "train", output).labels.tolist() == [2]
    kept = max((p for p in tmp_path.rglob("*.npz") if p.is_file()), key=lambda p: p.stat().st_mtime_ns)
    kept.write_bytes(kept.read_bytes()[:-30])
    assert open_shards(tmp_path, "train", output).labels.tolist() == [2]
    assert len(opened) == 3


def test_a_shard_cut_later_is_a_damaged_image(
    plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_shards(plain, tmp_path, "{}-{}.tar")
    loaders = build_loaders(make_config(tmp_path, OUTPUT=str(tmp_path / "output"), **WDS))
    os.truncate(tmp_path / "train-3.tar", 1000)
    os.truncate(tmp_path / "validation-1.tar", 1000)
    draw_epoch(loaders)
    assert loaders.train_dataset.undecodable and "train-3.tar@/images.v1/cat/" in caplog.text
    with raises(UndecodableImageError, "validation-1.tar@/images.v1/bee/2.png: expected"):
        val_set(loaders)


# --- Hugging Face -------------------------------------------------------------------------------------------


def hf_loaders(root: Path | str, **options: object) -> Loaders:
    return build_loaders(make_config(root, **HF, **options))


def test_names_of_splits_and_columns(plain: Path, tmp_path: Path) -> None:
    write_disk_folders(plain, tmp_path / "data")
    with raises(ValueError, "expected a split called train, got my_", "DATA.HF.TRAIN_SPLIT"):
        hf_loaders(tmp_path / "data")
    for column, label, problem in (
        ("pixels", "digit", "expected a column 'pixels' as DATA.HF.IMAGE_COLUMN, got id, pic, digit"),
        ("id", "digit", "expected images in the column 'id'"),
        ("pic", "id", "my_train, row 3: expected a label in [0, 3), got 3"),
    ):
        columns = {"DATA__HF__IMAGE_COLUMN": column, "DATA__HF__LABEL_COLUMN": label}
        with raises(ValueError, problem):
            hf_loaders(tmp_path / "data", **HF_NAMES | columns)


def test_two_columns_of_classes_are_not_clear(plain: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = make_rows(plain, "train", label="fine").add_column("coarse", [0] * 18)
    rows = rows.cast_column("coarse", datasets.ClassLabel(num_classes=3))
    for split in COUNTS:
        rows.save_to_disk(str(tmp_path / split))
    with raises(ValueError, "expected one column that can be it as DATA.HF.LABEL_COLUMN, got fine, coarse"):
        hf_loaders(tmp_path)


@pytest.mark.parametrize(("column", "error"), [("label", ValueError), ("image", UndecodableImageError)])
def test_a_row_that_lacks_something_is_named(
    column: str, error: type[ValueError], plain: Path, tmp_path: Path
) -> None:
    make_rows(plain, "train").save_to_disk(str(tmp_path / "train"))
    rows = make_rows(plain, "val")
    rows = rows.map(lambda _, index: {column: None} if index == 4 else {}, with_indices=True)
    rows.save_to_disk(str(tmp_path / "val"))
    with raises(error, "val, row 4: expected", f"in the column '{column}'"):
        val_set(hf_loaders(tmp_path))


@pytest.mark.parametrize("name", ["no/such", "/no/such/folder"])
def test_missing_data_sets(name: str) -> None:
    pytest.importorskip("datasets")
    with raises((ValueError, OSError), "expected a", "name on the hub", "got", "correct") as caught:
        hf_loaders(name)
    assert name in str(caught.value)


def test_damaged_parquet_and_a_single_file(plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.parquet"
    make_rows(plain, "val").to_parquet(path)
    weights = {"EVAL_MODE": True, "MODEL__RESUME": "weights.pth"}
    assert len(val_set(hf_loaders(path, DATA__HF__VAL_SPLIT="train", **weights))[0]) == 9
    path.write_bytes(path.read_bytes()[:300])
    with raises(ValueError, path, "expected a data set that the library datasets reads", "correct"):
        hf_loaders(path)


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with raises(ImportError, "DATA.DATASET hf: expected the library datasets", "pip install 'datasets>=4'"):
        hf_loaders(tmp_path)
