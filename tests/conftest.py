"""Shared fixtures: the repository, a model small enough for any test, and real data to train it on."""

import csv
import errno
import os
import shutil
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
os.environ.setdefault("OMP_NUM_THREADS", "1")

NANO = {
    "DATA.IMG_SIZE": 32,
    "DATA.NUM_WORKERS": 0,
    "MODEL.NAME": "nano",
    "MODEL.NUM_CLASSES": 10,
    "MODEL.DROP_PATH_RATE": 0.0,
    "MODEL.FOCAL.EMBED_DIM": 16,
    "MODEL.FOCAL.DEPTHS": [1, 1, 1, 1],
    "MODEL.FOCAL.NUM_HEADS": [1, 2, 2, 4],
    "MODEL.FOCAL.FOCAL_POOL": "fc",
    "MODEL.FOCAL.FOCAL_LEVELS": [2, 2, 2, 2],
    "TRAIN.EPOCHS": 2,
    "TRAIN.WARMUP_EPOCHS": 0,
}
NANO_WORDS = [word for pair in NANO.items() for word in pair]  # as for load_config
TRAIN_PER_CLASS = 13
VAL_IMAGES = 43  # no multiple of any batch size or number of processes in the tests


LONGEST = (  # files that start first, so that no process is left with a long one at the end
    *("test_triton", "test_compile_matrix", "test_openmmlab_commands", "test_docs", "test_distributed"),
    *("test_faults", "test_users_tools", "test_gpu_report", "test_learning"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, the others as they are."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def csv_rows(folder: Path, name: str = "") -> list[dict[str, str]]:
    """The rows of the one .csv file of a folder whose name ends so."""
    (path,) = folder.glob(f"*{name}.csv")
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module", autouse=True)
def own_scope() -> Iterator[None]:
    """Give every file MMEngine's default scope as it was: its Runners leave theirs behind."""
    registry = sys.modules.get("mmengine.registry")
    before = OrderedDict(registry.DefaultScope._instance_dict if registry else {})
    yield
    if registry := sys.modules.get("mmengine.registry"):
        registry.DefaultScope._instance_dict = before


@pytest.fixture
def full_disk() -> Iterator[None]:
    """The largest file that can be written has 5,000 bytes: a real error in the middle of a checkpoint."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def close_folder(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """A function that makes a folder that cannot be entered, by root neither."""

    def close(closed: Path) -> None:
        scandir = os.scandir
        closed.mkdir()

        def refuse(path: Path) -> Any:
            if Path(path) == closed:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)

    return close


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The classification demo data: real digits in train/ and val/."""
    from data.demo import DemoOptions, write_demo

    return write_demo(tmp_path_factory.mktemp("demo"), ["imagenet"], DemoOptions())["imagenet"]


@pytest.fixture(scope="session")
def few_images(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of the demo data: 13 training images per class, and 43 for validation."""
    root = tmp_path_factory.mktemp("few")
    val_count = 0
    for split in ("train", "val"):
        for folder in sorted((demo_data / split).iterdir()):
            target = root / split / folder.name
            target.mkdir(parents=True)
            wanted = TRAIN_PER_CLASS if split == "train" else 5 if val_count < VAL_IMAGES - 28 else 4
            for image in sorted(folder.iterdir())[:wanted]:
                shutil.copy(image, target)
                val_count += split == "val"
    return root


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's folder with detection/ and segmentation/: few small scenes, of no round size."""
    from data.demo import DemoOptions, write_demo

    options = DemoOptions(train_scenes=4, val_scenes=3, scene_width=122, scene_height=90)
    root = tmp_path_factory.mktemp("scenes")
    write_demo(root, ["detection", "segmentation"], options)
    return root


@pytest.fixture(scope="module")
def in_demo(scenes: Path) -> Iterator[None]:
    """Let the demo's configs read the scenes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEMO", str(scenes))
        yield


@pytest.fixture(scope="module")
def in_mmdet() -> Iterator[None]:
    """mmdet's registries, see `openmmlab_runs.in_scope`."""
    from openmmlab_runs import in_scope

    with in_scope("mmdet"):
        yield


@pytest.fixture(scope="module")
def in_mmseg() -> Iterator[None]:
    """mmseg's registries, see `openmmlab_runs.in_scope`."""
    from openmmlab_runs import in_scope

    with in_scope("mmseg"):
        yield
