"""Command lines over mmengine's Runner, for training and testing detectors and segmenters alike.

One process, torchrun or Slurm; on CPUs processes talk through gloo. Differences from the tools that mmdet and
mmseg ship: torchrun is noticed without being told, a checkpoint that lacks weights is refused in testing,
and what the user can correct is looked for first (check_config.py, check_data.py) and told in one line; the
variable FOCAL_TRACEBACK shows where it came from.
"""

import argparse
import gc
import os
import pickle
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import distributed, nn

from models import FocalTransformer, agree_on_backends
from utils import UserError, path_argument, user_input

if TYPE_CHECKING:
    from mmengine.config import Config
    from mmengine.runner import Runner

INSTALL = "run `make setup-openmmlab`"
DAMAGED = (pickle.UnpicklingError, struct.error)
LAUNCHERS = ("none", "pytorch", "slurm")
NO_GPU_AMP = "mixed precision needs a GPU, and there is none here: add --no-amp"


def parse_train(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of a training command."""
    parser = _parser("Trains on the data set that a config names.")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        type=path_argument,
        metavar="CHECKPOINT",
        help="go on from a checkpoint; without a name, from the newest one in the work dir",
    )
    parser.add_argument(
        "--pretrained",
        type=path_argument,
        metavar="FILE",
        help="ImageNet classifier whose weights the backbone starts from",
    )
    parser.add_argument(
        "--amp", action=argparse.BooleanOptionalAction, help="mixed precision on or off, whatever the config"
    )
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate from the batch size that the config was made for to that of this run",
    )
    return parser.parse_args(argv)


def parse_test(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of an evaluation command."""
    parser = _parser("Evaluates a checkpoint on the test set that a config names.")
    parser.add_argument("checkpoint", type=path_argument, help="file written by training")
    parser.add_argument(
        "--tta",
        "--multi-scale",
        action="store_true",
        help="test-time augmentation (several scales, flips): the config's tta_pipeline",
    )
    return parser.parse_args(argv)


def _parser(description: str) -> argparse.ArgumentParser:
    """What both commands take."""
    import_mmengine()
    from openmmlab.check_config import Options

    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", type=path_argument, help="config file")
    parser.add_argument(
        "--work-dir",
        type=path_argument,
        metavar="DIR",
        help="where logs and checkpoints go (work_dirs/<config>)",
    )
    parser.add_argument(
        "--cfg-options", nargs="+", action=Options, metavar="KEY=VALUE", help="over the config's values"
    )
    parser.add_argument(
        "--launcher", choices=LAUNCHERS, help="what started the processes (torchrun is noticed)"
    )
    parser.add_argument("--local_rank", "--local-rank", help="ignored: launchers set the environment")
    return parser


def import_mmengine() -> ModuleType:
    """mmengine with the parts used here, and the operators that mmcv may lack.

    Raises:
        UserError: what to run, where OpenMMLab's packages are missing.
    """
    try:
        import mmengine.config
        import mmengine.registry
        import mmengine.runner
    except ImportError as error:
        raise UserError(f"OpenMMLab's packages are not installed ({error}): {INSTALL}") from error
    from openmmlab import ops_bridge

    ops_bridge.install()
    numbers = {type(np.dtype(code)) for code in "?" + np.typecodes["AllInteger"] + np.typecodes["Float"]}
    torch.serialization.add_safe_globals([*numbers])  # of the logged values in checkpoints
    return mmengine


def read_config(path: str) -> "Config":
    """A config file, with what it inherits; imports what it asks for.

    Raises:
        UserError: no such file, it is no Python, or a package that it imports is not installed.
    """
    mmengine = import_mmengine()
    need_file(path, "config")
    try:
        with user_input():
            return mmengine.config.Config.fromfile(path)
    except SyntaxError as error:
        raise UserError(f"{path}: {error}") from error


def _common_config(args: argparse.Namespace) -> "Config":
    """The config with what the command line says about both training and testing."""
    config = read_config(args.config)
    from openmmlab.check_config import check_options

    check_options(config, args.cfg_options or {})
    config.merge_from_dict(args.cfg_options or {})
    config.work_dir = args.work_dir or config.get("work_dir") or f"work_dirs/{Path(args.config).stem}"
    config.launcher = args.launcher or ("pytorch" if distributed.is_torchelastic_launched() else "none")
    if config.launcher != "none" and not torch.cuda.is_available():
        wrapper = {"type": "MMDistributedDataParallel", "broadcast_buffers": False, "device_ids": None}
        unused = {"find_unused_parameters": config.get("find_unused_parameters", False)}
        config.setdefault("model_wrapper_cfg", wrapper | unused)
        config.pop("sync_bn", None)  # there is none on CPUs: each process normalises by its own images
        _normalise_locally(config.get("model"))
    return config


def _normalise_locally(options: Any) -> None:
    """Put BatchNorm of a single process into the place of SyncBN, in all that a config's model holds."""
    if isinstance(options, dict):
        if options.get("type") == "SyncBN":
            options["type"] = "BN"
        options = options.values()
    elif not isinstance(options, list | tuple):
        return
    for part in options:
        _normalise_locally(part)


def training_config(args: argparse.Namespace) -> "Config":
    """The config of a training run.

    Raises:
        UserError: options that this machine or the config cannot follow.
    """
    config = _common_config(args)
    wrapper = config.optim_wrapper
    if args.amp:
        wrapper.update(type="AmpOptimWrapper", loss_scale=wrapper.get("loss_scale", "dynamic"))
    elif args.amp is False:
        config.optim_wrapper = {
            k: v for k, v in wrapper.items() if k not in ("loss_scale", "dtype", "use_fsdp")
        }
        config.optim_wrapper.type = "OptimWrapper"
    if config.optim_wrapper.type == "AmpOptimWrapper" and not torch.cuda.is_available():
        raise UserError(NO_GPU_AMP)
    if args.auto_scale_lr:
        if "base_batch_size" not in config.get("auto_scale_lr", {}):
            raise UserError(f"--auto-scale-lr: {args.config} does not say auto_scale_lr.base_batch_size")
        config.auto_scale_lr.enable = True
    if args.pretrained:
        file = need_file(args.pretrained, "classifier's checkpoint")
        config.model.backbone.init_cfg = {"type": "Pretrained", "checkpoint": file}
    if args.resume is not None:
        config.resume = True
        config.load_from = None if args.resume == "auto" else args.resume
    if config.get("load_from") and "://" not in config.load_from:
        need_file(config.load_from, "checkpoint")
    return config


def testing_config(args: argparse.Namespace) -> "Config":
    """The config of an evaluation.

    Raises:
        UserError: --tta and a config that does not describe it.
    """
    config = _common_config(args)
    need_file(args.checkpoint, "checkpoint")
    config.load_from, config.resume = None, False
    if args.tta:
        if "tta_model" not in config or "tta_pipeline" not in config:
            raise UserError(
                f"--tta: {args.config} has no tta_model and tta_pipeline; leave it out, or add them "
                "(MMDetection merges boxes only, no masks)"
            )
        config.tta_model.module = config.model
        config.model = config.tta_model
        config.test_dataloader.dataset.pipeline = config.tta_pipeline
    # Another name than the training's, for the Runner writes it to the folder where that one lies. A Config
    # takes assignments for its own options, so that its name has to be set past it.
    object.__setattr__(config, "_filename", f"{Path(args.config).stem}_{'tta' if args.tta else 'test'}.py")
    return config


def need_file(path: str, kind: str) -> str:
    if not Path(path).is_file():
        raise UserError(f"{path}: expected a file with the {kind}, and there is none; check the path")
    return path


def build_runner(config: "Config") -> "Runner":
    """The Runner of a config; on CPUs it finds the process group made already."""
    if config.launcher != "none" and not torch.cuda.is_available() and not distributed.is_initialized():
        if config.launcher == "slurm":
            raise UserError("Slurm without GPUs: start the processes with torchrun instead")
        distributed.init_process_group("gloo")
    if "visualizer" in config:  # of one name there is one per process, which keeps to the first run's folder
        config.visualizer.name = f"visualizer-{time.time_ns()}"
    return import_mmengine().runner.Runner.from_cfg(config)


def unwrapped(runner: "Runner") -> nn.Module:
    """The detector or segmenter itself, without the wrapper for several processes and that of --tta."""
    model = getattr(runner.model, "module", runner.model)
    return getattr(model, "module", model)


def agree_on_attention(runner: "Runner", dtype: torch.dtype) -> None:
    """Let the backbones of all processes use the same attention operators, and log which."""
    backbone = getattr(unwrapped(runner), "backbone", None)
    if isinstance(backbone, FocalTransformer):
        runner.logger.info(f"attention: {' and '.join(dict.fromkeys(agree_on_backends(backbone, dtype)))}")


def load_all_weights(runner: "Runner", checkpoint: str, classes: Sequence[str] | None) -> None:
    """Load a checkpoint that has every weight of the runner's model, and no other.

    Raises:
        UserError: it has not, is none, or was trained for other classes.
    """
    with refusing(checkpoint):
        content = runner.load_checkpoint(checkpoint, strict=True)
    from openmmlab.check_data import check_trained_classes

    check_trained_classes(checkpoint, content, classes)


@contextmanager
def refusing(checkpoint: str) -> Iterator[None]:
    """What loading a checkpoint raises, as a UserError that names the file."""
    try:
        yield
    except (RuntimeError, EOFError, LookupError, TypeError, AttributeError, *DAMAGED) as error:
        raise UserError(f"{checkpoint} does not fit the config's model, or is damaged: {error}") from error


def run_command(action: Callable[[], None]) -> int:
    """Run a command; 2 for what the user can correct, told in one message."""
    try:
        action()
    except (UserError, OSError) as error:
        if os.environ.get("FOCAL_TRACEBACK"):
            raise
        # Mistakes on the command line meet all processes alike, later ones perhaps one alone.
        if os.environ.get("RANK", "0") == "0" or distributed.is_initialized():
            print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if distributed.is_initialized():
            gc.collect()  # the model's wrapper holds the group; threads of one that outlives it can abort
            distributed.destroy_process_group()
    return 0


def _build(config: "Config", splits: Sequence[str]) -> tuple["Runner", tuple[str, ...] | None]:
    """The Runner of a config whose model and data sets fit each other, and the names of the classes.

    Raises:
        UserError: they do not, see check_data.py.
    """
    from openmmlab import check_data

    classes = check_data.check_data_sets(config, splits)
    runner = build_runner(config)
    model = unwrapped(runner)
    check_data.check_model(model, classes)
    if config.get("default_scope") == "mmdet":
        check_data.check_coco_when_read(config, model)
    for split in splits:
        loop = getattr(runner, f"{split}_loop")  # reads the data set
        if split == "train" and config.get("default_scope") == "mmseg":
            check_data.check_class_weights(model, loop.dataloader.dataset)
    return runner, classes


def _train(argv: Sequence[str] | None) -> None:
    config = training_config(parse_train(argv))
    from openmmlab.check_config import explained
    from openmmlab.loaded_weights import LoadedWeights

    with explained(config):
        runner, _ = _build(config, ("train", "val"))
        runner.register_hook(LoadedWeights())
        wrapper = config.optim_wrapper
        mixed = wrapper.type == "AmpOptimWrapper"
        dtype = getattr(torch, wrapper.get("dtype") or "float16") if mixed else torch.float32
        agree_on_attention(runner, dtype)
        runner.train()


def _test(argv: Sequence[str] | None) -> None:
    args = parse_test(argv)
    config = testing_config(args)
    from openmmlab.check_config import explained

    with explained(config):
        runner, classes = _build(config, ("test",))
        load_all_weights(runner, args.checkpoint, classes)
        with torch.no_grad():
            agree_on_attention(runner, torch.float32)
        runner.test()


def train(argv: Sequence[str] | None = None) -> int:
    """The training command; the process's exit status."""
    return run_command(lambda: _train(argv))


def test(argv: Sequence[str] | None = None) -> int:
    """The evaluation command; the process's exit status."""
    return run_command(lambda: _test(argv))
