"""Who imports whom, read from the source, and that importing has no effects."""

import ast
import json
import os
import subprocess
import sys
from fnmatch import fnmatch
from functools import lru_cache
from graphlib import TopologicalSorter
from pathlib import Path

from conftest import REPO

FOLDERS = ("models", "data", "training", "openmmlab", "classification", "detection", "segmentation", "tools")
SOURCES = sorted(
    path.relative_to(REPO).as_posix()
    for path in [*REPO.glob("*.py"), *(found for name in FOLDERS for found in REPO.glob(f"{name}/**/*.py"))]
)
TASKS = ("classification", "detection", "segmentation")
MODEL_NEEDS = {"numpy", "torch", "timm", "filelock", "safetensors", "huggingface_hub"}
"""torch needs filelock itself, timm the last two."""

OPTIONAL = (  # packages that only some commands need
    *("triton", "mmdet", "mmseg", "mmcv", "mmengine", "pycocotools", "onnx", "onnxruntime", "matplotlib"),
    *("tensorboard", "torch.utils.tensorboard", "wandb", "datasets", "transformers", "sklearn", "cv2"),
)
OPTIONAL_AS_A_WHOLE = (  # files that import them at their top
    *("models/ops/triton/*", "detection/*", "segmentation/*", "data/demo*.py"),
    *("openmmlab/check_config.py", "openmmlab/check_data.py", "openmmlab/start_checks.py"),
    *("openmmlab/focal_backbone.py", "openmmlab/file_backend.py", "openmmlab/mmcv_ops.py"),
    *("tools/benchmarks/kernel_figures.py", "tools/benchmarks/stub_driver.py"),
)


def matches(source: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(source, pattern) for pattern in patterns)


def guarded(node: ast.AST) -> bool:
    """Whether a statement is ``if TYPE_CHECKING:``."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@lru_cache
def imports_of(source: str, at_import: bool = False) -> tuple[str, ...]:
    """Dotted names that a file imports; relative ones are made absolute, for type checkers only are left out.

    Args:
        source: path in the repository.
        at_import: only what importing the file runs, not what stands in functions.
    """
    package = source.removesuffix(".py").split("/")[:-1]
    pending: list[ast.AST] = [ast.parse((REPO / source).read_text(encoding="utf-8"))]
    names: list[str] = []
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{module}.{alias.name}" for alias in node.names]
        elif not guarded(node) and not (at_import and isinstance(node, ast.FunctionDef | ast.Lambda)):
            pending.extend(ast.iter_child_nodes(node))
    return tuple(names)


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


# --- Who imports whom ---------------------------------------------------------------------------------------

MODEL_SOURCES = [source for source in SOURCES if source.startswith("models/")]


def test_models_need_torch_timm_and_themselves() -> None:
    """The network, which runs where it is copied to, needs less."""
    allowed = MODEL_NEEDS | sys.stdlib_module_names | {"models"}
    for source in MODEL_SOURCES:
        for name in imports_of(source):
            top = name.split(".")[0]
            kernel = top == "triton" and source.startswith("models/ops/triton/")
            assert top in allowed or kernel, f"{source} imports {name}"
            if source == "models/focal_transformer.py":
                assert top in {"numpy", "torch", *sys.stdlib_module_names} or is_in(name, "timm.layers"), name


def test_imports_go_towards_the_models() -> None:
    """Nobody imports main or the tests; models know nobody else, data no models, a task no other task, and
    only tools know tools."""
    own = {source.split("/")[0].removesuffix(".py") for source in SOURCES}
    hidden = {here: {*TASKS, "tools"} - {here} for here in own - {"tools"}} | {
        "models": own - {"models"},
        "data": {"models", "training", "config", "openmmlab", *TASKS, "tools"},
        "config": own - {"config", "utils"},
        "utils": own - {"utils"},
        "logger": own - {"logger"},
    }
    for source in SOURCES:
        here = source.split("/")[0].removesuffix(".py")
        for name in imports_of(source) if here != "main" else ():
            top = name.split(".")[0]
            assert top not in {"main", "tests", "conftest"} | hidden.get(here, set()), (
                f"{source} imports {name}"
            )


def test_optional_packages_are_imported_where_they_are_used() -> None:
    """Not at the top of a file that other commands need."""
    for source in SOURCES:
        for name in () if matches(source, OPTIONAL_AS_A_WHOLE) else imports_of(source, at_import=True):
            assert not any(is_in(name, package) for package in OPTIONAL), f"{source} imports {name}"


def test_there_is_no_import_cycle() -> None:
    """Over what importing runs; a package stands for all of its files outside of itself."""
    modules = {
        source.removesuffix(".py").removesuffix("/__init__").replace("/", "."): source for source in SOURCES
    }
    edges: dict[str, set[str]] = {}
    for module, source in modules.items():
        names = imports_of(source, at_import=True)
        used = {*names, *(name.rpartition(".")[0] for name in names)} & modules.keys()
        edges[module] = {other for other in used - {module} if not module.startswith(f"{other}.")}
    assert "models.focal_transformer" in edges["models.registry"]
    TopologicalSorter(edges).prepare()  # raises CycleError with the cycle


# --- What importing does ------------------------------------------------------------------------------------

IMPORT_ALL = """
import importlib, json, os, random, sys, threading
import numpy, torch, torchvision, timm  # what they do is theirs
def state():
    threads = threading.active_count(), torch.get_num_threads()
    seeds = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    modes = torch.is_grad_enabled(), torch.get_default_dtype(), torch.cuda.is_initialized()
    return threads, seeds, modes, os.listdir()
before = state()
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
    assert state() == before, name
"""


def test_importing_has_no_effects(tmp_path: Path) -> None:
    """On any module of models/ and data/, and on those of the root; main included."""
    names = [
        source.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for source in SOURCES
        if source.split("/")[0] not in (*TASKS, "tools", "hubconf.py")
        and not matches(source, OPTIONAL_AS_A_WHOLE)
    ]
    assert {"models", "models.ops.cpu", "data.build", "main"} <= set(names)
    command = [sys.executable, "-W", "ignore", "-c", IMPORT_ALL, json.dumps(names)]
    environment = os.environ | {"PYTHONPATH": str(REPO), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")
