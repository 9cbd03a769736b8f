"""Shared by the commands that draw predictions: arguments, loading a model, names of the pictures."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from openmmlab.runner import (
    checkpoint_errors_as_user_errors,
    import_mmengine,
    need_file,
    read_config,
    run_command,
)
from utils import UserError, escape_output, keep_inputs, path_argument, pick_device

if TYPE_CHECKING:
    from mmengine.model import BaseModel

READABLE = 640  # pixels; smaller images are enlarged, so that labels drawn on them can be read

Draw = Callable[["BaseModel", np.ndarray, float], tuple[np.ndarray, str]]
"""From a model, an image [H, W, 3] in BGR and a threshold: the picture, no smaller, and a line about it."""


def parse(description: str, argv: Sequence[str] | None = None, threshold: float = 0.3) -> argparse.Namespace:
    """The arguments of a command that draws predictions; `threshold` is the default."""
    parser = argparse.ArgumentParser(description=description)
    path = path_argument
    parser.add_argument("images", type=path, nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--config", type=path, required=True, help="config of the checkpoint")
    parser.add_argument("--checkpoint", type=path, required=True, help="file written by training")
    parser.add_argument("--out", type=path, default="predictions", help="folder of pictures (%(default)s)")
    least = "least score that is drawn (%(default)s)"
    parser.add_argument("--threshold", type=float, default=threshold, help=least)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (the GPU where there is one)")
    return parser.parse_args(argv)


def load_model(config_file: str, checkpoint: str, device_name: str | None) -> "BaseModel":
    """A config's model on a device, with all weights of a checkpoint, for mmdet's and mmseg's inference
    functions.

    Raises:
        UserError: no such file or device, or a checkpoint that does not fit.
    """
    device = pick_device(device_name or ("cuda" if torch.cuda.is_available() else "cpu"))
    mmengine = import_mmengine()
    config = read_config(config_file)
    need_file(checkpoint, "checkpoint")
    mmengine.registry.init_default_scope(config.default_scope)
    from openmmlab.check_config import explained_by_config
    from openmmlab.check_data import check_model

    with explained_by_config(config):
        model = mmengine.registry.MODELS.build(config.model)
    with checkpoint_errors_as_user_errors(checkpoint):
        content = mmengine.runner.load_checkpoint(model, checkpoint, map_location="cpu", strict=True)
    if "dataset_meta" not in content.get("meta", {}):
        raise UserError(f"{checkpoint} holds no class names: expected a checkpoint that training wrote")
    if config.get("test_dataloader"):  # mmseg's function reads a variable, which may be of another pipeline
        dataset = config.test_dataloader.dataset
        while "pipeline" not in dataset and "dataset" in dataset:
            dataset = dataset.dataset
        config.test_pipeline = dataset.get("pipeline") or config.get("test_pipeline")
    model.cfg, model.dataset_meta = config, content["meta"]["dataset_meta"]
    check_model(model, model.dataset_meta["classes"])
    return model.to(device).eval()


def read_image(path: str) -> np.ndarray:
    """An image file as [H, W, 3] in BGR, enlarged if its longer side is below READABLE.

    Raises:
        UserError: no such file, or not an image.
    """
    import mmcv

    need_file(path, "image")
    image = mmcv.imread(path) if Path(path).stat().st_size else None  # opencv fails at an empty file
    if image is None:
        raise UserError(f"{path}: not an image that opencv can read")
    factor = READABLE / max(image.shape[:2])
    return mmcv.imrescale(image, factor, interpolation="bicubic") if factor > 1 else image


def run(draw: Draw, args: argparse.Namespace) -> int:
    """Draw the predictions for each image and print the paths; returns 2 after a mistake of the user."""
    escape_output()
    paths = [Path(args.out) / f"{Path(image).stem}.png" for image in args.images]

    def draw_all() -> None:
        if twice := sorted({path.name for path in paths if paths.count(path) > 1}):
            raise UserError(f"several images would become {', '.join(twice)}: give them to separate commands")
        keep_inputs(args.images, paths)
        model = load_model(args.config, args.checkpoint, args.device)
        import mmcv

        for image, path in zip(args.images, paths, strict=True):
            picture, text = draw(model, read_image(image), args.threshold)
            mmcv.imwrite(picture, str(path))
            print(f"{path}: {text}")

    return run_command(draw_all)
