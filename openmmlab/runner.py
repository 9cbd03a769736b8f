"""Command lines over mmengine's Runner, for training and testing detectors and segmenters alike.

One process, torchrun or Slurm; on CPUs processes talk through gloo. Differences from the tools that mmdet and
mmseg ship: torchrun is noticed without being told, a checkpoint that lacks weights is refused in testing,
and what the user can correct is told in one line (the variable FOCAL_TRACEBACK shows where it came from).
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

import torch
from torch import distributed

from models import FocalTransformer, agree_on_backends

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
        metavar="CHECKPOINT",
        help="go on from a checkpoint; without a name, from the newest one in the work dir",
    )
    parser.add_argument(
        "--pretrained", metavar="FILE", help="ImageNet classifier whose weights the backbone starts from"
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
    parser.add_argument("checkpoint", help="file written by training")
    parser.add_argument(
        "--tta",
        "--multi-scale",
        action="store_true",
        help="test-time augmentation (several scales, flips): the config's tta_pipeline",
    )
    return parser.parse_args(argv)


def _parser(description: str) -> argparse.ArgumentParser:
    """What both commands take."""
    action = import_mmengine().config.DictAction
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", help="config file")
    parser.add_argument(
        "--work-dir", metavar="DIR", help="where logs and checkpoints go (work_dirs/<config>)"
    )
    parser.add_argument(
        "--cfg-options", nargs="+", action=action, metavar="KEY=VALUE", help="over the config's values"
    )
    parser.add_argument(
        "--launcher", choices=LAUNCHERS, help="what started the processes (torchrun is noticed)"
    )
    parser.add_argument("--local_rank", "--local-rank", help="ignored: launchers set the environment")
    return parser


def import_mmengine() -> ModuleType:
    """mmengine with the parts used here, and the operators that mmcv may lack.

    Raises:
        ImportError: what to run, where OpenMMLab's packages are missing.
    """
    try:
        import mmengine.config
        import mmengine.registry
        import mmengine.runner
    except ImportError as error:
        raise ImportError(f"OpenMMLab's packages are not installed ({error}): {INSTALL}") from error
    from openmmlab import ops_bridge

    ops_bridge.install()
    return mmengine


def read_config(path: str) -> "Config":
    """A config file, with what it inherits; imports what it asks for.

    Raises:
        FileNotFoundError: no such file.
        ImportError: a package that the config imports is not installed.
    """
    return import_mmengine().config.Config.fromfile(need_file(path, "config"))


def _common_config(args: argparse.Namespace) -> "Config":
    """The config with what the command line says about both training and testing."""
    config = read_config(args.config)
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
        ValueError: options that this machine or the config cannot follow.
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
        raise ValueError(NO_GPU_AMP)
    if args.auto_scale_lr:
        if "base_batch_size" not in config.get("auto_scale_lr", {}):
            raise ValueError(f"--auto-scale-lr: {args.config} does not say auto_scale_lr.base_batch_size")
        config.auto_scale_lr.enable = True
    if args.pretrained:
        file = need_file(args.pretrained, "classifier's checkpoint")
        config.model.backbone.init_cfg = {"type": "Pretrained", "checkpoint": file}
    if args.resume is not None:
        config.resume = True
        config.load_from = None if args.resume == "auto" else need_file(args.resume, "checkpoint")
    return config


def testing_config(args: argparse.Namespace) -> "Config":
    """The config of an evaluation.

    Raises:
        ValueError: --tta and a config that does not describe it.
    """
    config = _common_config(args)
    need_file(args.checkpoint, "checkpoint")
    config.load_from, config.resume = None, False
    if args.tta:
        if "tta_model" not in config or "tta_pipeline" not in config:
            raise ValueError(
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
        raise FileNotFoundError(f"{path}: expected a file with the {kind}, and there is none; check the path")
    return path


def build_runner(config: "Config") -> "Runner":
    """The Runner of a config; on CPUs it finds the process group made already."""
    if config.launcher != "none" and not torch.cuda.is_available() and not distributed.is_initialized():
        if config.launcher == "slurm":
            raise ValueError("Slurm without GPUs: start the processes with torchrun instead")
        distributed.init_process_group("gloo")
    if "visualizer" in config:  # of one name there is one per process, which keeps to the first run's folder
        config.visualizer.name = f"visualizer-{time.time_ns()}"
    return import_mmengine().runner.Runner.from_cfg(config)


def agree_on_attention(runner: "Runner", dtype: torch.dtype) -> None:
    """Let the backbones of all processes use the same attention operators, and log which."""
    model = getattr(runner.model, "module", runner.model)  # of a wrapper for several processes, or of --tta
    backbone = getattr(getattr(model, "module", model), "backbone", None)
    if isinstance(backbone, FocalTransformer):
        runner.logger.info(f"attention: {' and '.join(dict.fromkeys(agree_on_backends(backbone, dtype)))}")


def load_all_weights(runner: "Runner", checkpoint: str) -> None:
    """Load a checkpoint that has every weight of the runner's model, and no other.

    Raises:
        ValueError: it has not, or is none.
    """
    with refusing(checkpoint):
        runner.load_checkpoint(checkpoint, strict=True)


@contextmanager
def refusing(checkpoint: str) -> Iterator[None]:
    """What loading a checkpoint raises, as a ValueError that names the file."""
    try:
        yield
    except (RuntimeError, EOFError, LookupError, TypeError, AttributeError, *DAMAGED) as error:
        raise ValueError(f"{checkpoint} does not fit the config's model, or is damaged: {error}") from error


def _run(action: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None) -> int:
    """Run a command; 2 for what the user can correct, told in one message."""
    try:
        action(argv)
    except (ValueError, OSError, ImportError) as error:
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


def _train(argv: Sequence[str] | None) -> None:
    config = training_config(parse_train(argv))
    runner = build_runner(config)
    if not (config.model.backbone.get("init_cfg") or config.get("load_from") or config.get("resume")):
        runner.logger.warning("the backbone starts from random weights: --pretrained names a classifier's")
    wrapper = config.optim_wrapper
    mixed = wrapper.type == "AmpOptimWrapper"
    agree_on_attention(runner, getattr(torch, wrapper.get("dtype") or "float16") if mixed else torch.float32)
    runner.train()


def _test(argv: Sequence[str] | None) -> None:
    args = parse_test(argv)
    runner = build_runner(testing_config(args))
    load_all_weights(runner, args.checkpoint)
    with torch.no_grad():
        agree_on_attention(runner, torch.float32)
    runner.test()


def train(argv: Sequence[str] | None = None) -> int:
    """The training command; the process's exit status."""
    return _run(_train, argv)


def test(argv: Sequence[str] | None = None) -> int:
    """The evaluation command; the process's exit status."""
    return _run(_test, argv)
