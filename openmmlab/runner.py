"""Command lines for mmengine's Runner: training and testing of detectors and segmenters.

They run in one process, under torchrun or under Slurm; CPUs communicate through gloo. Differences from the
tools of mmdet and mmseg: torchrun is recognised, testing refuses a checkpoint that lacks weights, and the
user's mistakes, also those that a library finds while it builds, are reported in one line (check_config.py,
check_data.py, start_checks.py). FOCAL_TRACEBACK=1 in the environment shows the traceback.
"""

import argparse
import gc
import pickle
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch
from torch import distributed, nn

import utils
from models import FocalTransformer, agree_on_backends
from utils import UserError, path_argument, user_input

if TYPE_CHECKING:
    from mmengine.config import Config
    from mmengine.runner import Runner

INSTALL = "run `make setup-openmmlab`"


def parse_train(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of a training command."""
    parser = _parser("Trains on the data set that a config names.")
    resume = "continue from a checkpoint; without a name, from the newest one in the work dir"
    file = dict(type=path_argument, metavar="FILE")
    parser.add_argument("--resume", nargs="?", const="auto", **file, help=resume)
    parser.add_argument(
        "--pretrained",
        **file,
        help="classifier, detector or segmenter from whose weights the backbone starts",
    )
    flag = argparse.BooleanOptionalAction
    parser.add_argument("--amp", action=flag, help="mixed precision on or off, whatever the config says")
    rate = "scale the learning rate from the batch size that the config was made for to that of this run"
    parser.add_argument("--auto-scale-lr", action="store_true", help=rate)
    return parser.parse_args(argv)


def parse_test(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of an evaluation command."""
    parser = _parser("Evaluates a checkpoint on the test set that a config names.")
    parser.add_argument("checkpoint", type=path_argument, help="file written by training")
    views = "test-time augmentation (several scales, flips): the config's tta_pipeline"
    parser.add_argument("--tta", "--multi-scale", action="store_true", help=views)
    return parser.parse_args(argv)


def _parser(description: str) -> argparse.ArgumentParser:
    """A parser with the arguments of both commands."""
    import_mmengine()
    from openmmlab.check_config import Options

    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", type=path_argument, help="config file")
    folder = "where logs and checkpoints go (work_dirs/<config>)"
    parser.add_argument("--work-dir", type=path_argument, metavar="DIR", help=folder)
    values = dict(nargs="+", metavar="KEY=VALUE", help="replace values of the config")
    parser.add_argument("--cfg-options", action=Options, **values)
    launchers = ("none", "pytorch", "slurm")
    parser.add_argument(
        "--launcher", choices=launchers, help="what starts the processes (torchrun is recognised)"
    )
    parser.add_argument("--local_rank", "--local-rank", help="ignored: launchers set the environment")
    return parser


def import_mmengine() -> ModuleType:
    """Import mmengine with the parts used here, the operators that mmcv may lack, and atomic writing.

    Raises:
        UserError: OpenMMLab's packages are missing.
    """
    try:
        import mmengine.config
        import mmengine.registry
        import mmengine.runner

        from openmmlab import file_backend, mmcv_ops

        mmcv_ops.install()
        file_backend.install()
    except ImportError as error:
        raise UserError(f"OpenMMLab's packages are not installed ({error}): {INSTALL}") from error
    numbers = {type(np.dtype(code)) for code in "?" + np.typecodes["AllInteger"] + np.typecodes["Float"]}
    torch.serialization.add_safe_globals([*numbers])  # of the logged values in checkpoints
    return mmengine


def read_config(path: str) -> "Config":
    """Read a config file and those it inherits from; imports its `custom_imports`.

    Raises:
        UserError: the file is missing or not Python, or a package that it imports is not installed.
    """
    mmengine = import_mmengine()
    need_file(path, "config")
    try:
        with user_input():
            config = mmengine.config.Config.fromfile(path)
    except SyntaxError as error:
        raise UserError(f"{path}: {error}") from error
    try:
        import_module(config.get("default_scope") or "mmengine")
    except ImportError as error:
        raise UserError(
            f"{path} needs {config.default_scope}, which cannot be imported ({error}): {INSTALL}"
        ) from error
    return config


def _common_config(args: argparse.Namespace) -> "Config":
    """The config with the arguments that training and testing share."""
    config = read_config(args.config)
    from openmmlab.check_config import check_overrides, nodes

    check_overrides(config, args.cfg_options or {})
    config.merge_from_dict(args.cfg_options or {})
    config.work_dir = args.work_dir or config.get("work_dir") or f"work_dirs/{Path(args.config).stem}"
    config.launcher = args.launcher or ("pytorch" if distributed.is_torchelastic_launched() else "none")
    if config.launcher != "none" and not torch.cuda.is_available():
        wrapper = {"type": "MMDistributedDataParallel", "broadcast_buffers": False, "device_ids": None}
        unused = {"find_unused_parameters": config.get("find_unused_parameters", False)}
        config.setdefault("model_wrapper_cfg", wrapper | unused)
        config.pop("sync_bn", None)  # not available on CPUs, where each process normalises by its own images
        for _, node in nodes(config.get("model"), "model"):
            if node.get("type") == "SyncBN":
                node["type"] = "BN"
    return config


def training_config(args: argparse.Namespace) -> "Config":
    """The config of a training run.

    Raises:
        UserError: options that this machine or the config does not support.
    """
    config = _common_config(args)
    wrapper = config.optim_wrapper
    if args.amp:
        wrapper.update(type="AmpOptimWrapper", loss_scale=wrapper.get("loss_scale", "dynamic"))
    elif args.amp is False and "type" in wrapper:
        config.optim_wrapper = {
            k: v for k, v in wrapper.items() if k not in ("loss_scale", "dtype", "use_fsdp")
        }
        config.optim_wrapper.type = "OptimWrapper"
    if _is_mixed(config) and not torch.cuda.is_available():
        instead = "leave out --amp" if args.amp else "add --no-amp"
        raise UserError(f"mixed precision needs a GPU, and there is none here: {instead}")
    if args.auto_scale_lr:
        if "base_batch_size" not in config.get("auto_scale_lr", {}):
            raise UserError(f"--auto-scale-lr: {args.config} has no auto_scale_lr.base_batch_size")
        config.auto_scale_lr.enable = True
    if args.pretrained:
        file = need_file(args.pretrained, "checkpoint of a classifier, detector or segmenter")
        if "backbone" not in config.model:
            raise UserError(
                f"--pretrained: {args.config} has no model.backbone; set init_cfg of the one inside"
            )
        config.model.backbone.init_cfg = {"type": "Pretrained", "checkpoint": file}
    if args.resume is not None:
        found = newest_checkpoint(config.work_dir) if args.resume == "auto" else args.resume
        config.resume = found is not None  # a run that has none begins, from load_from if there is one
        config.load_from = found or config.get("load_from")
    if config.get("load_from") and "://" not in config.load_from:
        need_file(config.load_from, "checkpoint")
    return config


def newest_checkpoint(work_dir: str) -> str | None:
    """The checkpoint that training saved last in a folder, which may have been moved; None if there is none.

    Raises:
        UserError: it is gone, or its name was not written because the machine went down.
    """
    pointer = Path(work_dir) / "last_checkpoint"
    if not pointer.is_file():
        return None
    named = Path(pointer.read_text().strip() or "an empty name")
    found = next((path for path in (named, Path(work_dir) / named.name) if path.is_file()), None)
    if found is None:
        raise UserError(f"{pointer} names {named}, which is not there: choose a checkpoint, --resume FILE")
    return str(found)


def _is_mixed(config: "Config") -> bool:
    """Whether a config trains in mixed precision; its optimizer's wrapper may have no type."""
    kind = config.optim_wrapper.get("type")
    return getattr(kind, "__name__", kind) == "AmpOptimWrapper"


def testing_config(args: argparse.Namespace) -> "Config":
    """The config of an evaluation.

    Raises:
        UserError: --tta with a config that does not define it.
    """
    config = _common_config(args)
    need_file(args.checkpoint, "checkpoint")
    config.load_from, config.resume = args.checkpoint, False
    if args.tta:
        if "tta_model" not in config or "tta_pipeline" not in config:
            raise UserError(
                f"--tta: {args.config} has no tta_model and tta_pipeline; leave it out, or add them"
            )
        config.tta_model.module = config.model
        config.model = config.tta_model
        config.test_dataloader.dataset.pipeline = config.tta_pipeline
    # The Runner writes the config to the work dir under this name, which must differ from the training's.
    # `config.x = ...` would set an option.
    object.__setattr__(config, "_filename", f"{Path(args.config).stem}_{'tta' if args.tta else 'test'}.py")
    return config


def need_file(path: str, kind: str) -> str:
    """Return the path; UserError if it is no file."""
    if not Path(path).is_file():
        got = "a folder; name the files in it" if Path(path).is_dir() else "no file; check the path"
        raise UserError(f"{path}: expected a file with the {kind}, got {got}")
    return path


def build_runner(config: "Config") -> "Runner":
    """The Runner of a config; on CPUs the process group is created first."""
    if config.launcher != "none" and not torch.cuda.is_available() and not distributed.is_initialized():
        if config.launcher == "slurm":
            raise UserError("Slurm without GPUs: start the processes with torchrun instead")
        distributed.init_process_group("gloo")
    if "visualizer" in config:  # one of the same name would be reused, with the folder of an earlier run
        config.visualizer.name = f"visualizer-{time.time_ns()}"
    return import_mmengine().runner.Runner.from_cfg(config)


def unwrapped(runner: "Runner") -> nn.Module:
    """The detector or segmenter itself, without the wrappers for several processes and for --tta."""
    model = getattr(runner.model, "module", runner.model)
    return getattr(model, "module", model)


def agree_on_attention(runner: "Runner", dtype: torch.dtype) -> None:
    """Make all processes use the same attention operators, and log their names."""
    backbone = getattr(unwrapped(runner), "backbone", None)
    if isinstance(backbone, FocalTransformer):
        runner.logger.info(f"attention: {' and '.join(dict.fromkeys(agree_on_backends(backbone, dtype)))}")


@contextmanager
def checkpoint_errors_as_user_errors(checkpoint: str) -> Iterator[None]:
    """Raise errors of loading a checkpoint as a UserError that names the file."""
    try:
        yield
    except (RuntimeError, EOFError, LookupError, pickle.UnpicklingError, struct.error) as error:
        raise UserError(
            f"{checkpoint} does not fit the config's model, or is damaged: {error!s:.1000}"
        ) from error


def _load(load: Callable[..., Any], classes: Sequence[str] | None, file: str, **options: Any) -> Any:
    """Call a Runner's `load`; errors name the file. None as `classes` accepts those of any training."""
    from openmmlab.check_data import check_trained_classes

    with checkpoint_errors_as_user_errors(file):
        content = load(file, **options)
    check_trained_classes(file, content, classes)
    return content


def run_command(action: Callable[[], None]) -> int:
    """`utils.run_command`, which ends the process group."""
    try:
        return utils.run_command(action)
    finally:
        if distributed.is_initialized():
            gc.collect()  # frees the model's wrapper, which holds the group: its threads could abort at exit
            distributed.destroy_process_group()


def _build(config: "Config", splits: Sequence[str]) -> tuple["Runner", tuple[str, ...] | None]:
    """The Runner of a config, whose model and data sets are checked to fit, and the class names.

    Raises:
        UserError: they do not fit, see check_data.py.
    """
    from openmmlab import check_config, check_data

    check_config.check_nms(config)
    classes = check_data.check_data_sets(config, splits)
    runner = build_runner(config)
    check_data.check_model(unwrapped(runner), classes)
    return runner, classes


@contextmanager
def _checked(config: "Config") -> Iterator[None]:
    """Context manager in which mistakes in a config and its annotation files become a UserError."""
    from openmmlab.check_config import explained_by_config
    from openmmlab.check_data import checked_annotations

    with explained_by_config(config), checked_annotations(config):
        yield


def _train(config: "Config") -> None:
    from openmmlab.start_checks import StartChecks

    with _checked(config):
        runner, _ = _build(config, ("train", "val"))
        runner.register_hook(StartChecks())
        half = config.optim_wrapper.get("dtype") or "float16"
        agree_on_attention(runner, getattr(torch, half) if _is_mixed(config) else torch.float32)
        with patch.object(runner, "load_checkpoint", partial(_load, runner.load_checkpoint, None)):
            runner.train()


def _test(args: argparse.Namespace) -> None:
    config = testing_config(args)
    with _checked(config):
        runner, classes = _build(config, ("test",))
        with torch.no_grad():
            agree_on_attention(runner, torch.float32)
        load = partial(_load, runner.load_checkpoint, classes, strict=True)
        with patch.object(runner, "load_checkpoint", load):  # `test` loads when the hooks are ready
            runner.test()


def train(argv: Sequence[str] | None = None) -> int:
    """The training command; the process's exit status."""
    return run_command(lambda: _train(training_config(parse_train(argv))))


def test(argv: Sequence[str] | None = None) -> int:
    """The evaluation command; the process's exit status."""
    return run_command(lambda: _test(parse_test(argv)))
