"""Draws what a Focal Transformer looks at in an image, as PNG files.

    python -m tools.visualize IMAGE --cfg FILE --kinds keys
    python -m tools.visualize IMAGE --resume CHECKPOINT [--cfg FILE] [--at X Y] [--out DIR]

keys       which tokens a query sees in each stage, at each granularity; needs no weights
attention  how its attention is divided among them, mean over heads
heads      the same by head, one file per stage
rollout    attention rollout: which pixels reach the classifier
gradcam    Grad-CAM: which pixels raise the logit of a class

The image is resized and cropped as in evaluation; the query is a pixel of the result.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

import utils
from classification import predict
from models import build_model
from tools.figures import attention, drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger("visualize")


class Scene:
    """An image, a model, and the pixel of a query.

    Args:
        args: the command line.

    Raises:
        OSError: a file cannot be read.
        ValueError: the arguments do not fit the model.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        if args.resume or set(args.kinds) != {"keys"}:
            self.trained = predict.load_trained(args)
        else:
            config, device = predict.load_config_of(args), torch.device("cpu")
            self.trained = predict.Trained(
                config, build_model(config).eval(), device, utils.Precision(torch.float32)
            )
        self.model = self.trained.model
        self.input = predict.read_image(args.image, self.trained.transform())[None].to(self.trained.device)
        height, width = self.input.shape[2:]
        self.at = tuple(args.at) if args.at else (width // 2, height // 2)
        if not (0 <= self.at[0] < width and 0 <= self.at[1] < height):
            raise ValueError(
                f"--at: expected a pixel of the model's input, X below {width} and Y below {height}, got "
                f"{self.at[0]} {self.at[1]}"
            )
        self.maps = attention.stage_maps(self.model, height, width, args.block)
        self.strides = attention.strides(self.model)

    def picture(self) -> np.ndarray:
        """The input as an image, [H, W, 3] in [0, 1]."""
        data = self.trained.config.DATA
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.MEAN, data.STD))
        if self.input.shape[1] == 1:
            mean, std = mean.mean(dim=0, keepdim=True), std.mean(dim=0, keepdim=True)
        pixels = (self.input[0].cpu() * std + mean).clamp(0, 1).expand(3, -1, -1)
        return pixels.permute(1, 2, 0).numpy()

    def title(self, text: str, query: bool = True) -> str:
        """The model's name, what is drawn, and of which image."""
        where = f"{Path(self.args.image).name}" + f", query at {self.at[0]}, {self.at[1]}" * query
        return f"{self.trained.config.MODEL.NAME}: {text}, {where}"

    def records(self) -> list[list[attention.BlockAttention]]:
        """The attention of every block, by stage."""
        return attention.record(self.model, self.input)


# Each returns figures by file name.


def draw_keys(scene: Scene) -> dict[str, "Figure"]:
    title = scene.title("the keys of a query")
    figure = drawing.keys_figure([("", scene.maps)], scene.picture(), scene.at, scene.strides, title)
    return {"keys": figure}


def draw_attention(scene: Scene) -> dict[str, "Figure"]:
    chosen, title = [stage[scene.args.block] for stage in scene.records()], scene.title("mean over heads")
    figure = drawing.attention_figure(chosen, scene.picture(), scene.at, scene.strides, title)
    return {"attention": figure}


def draw_heads(scene: Scene) -> dict[str, "Figure"]:
    return {
        f"heads_stage{number}": drawing.heads_figure(
            stage[scene.args.block], scene.picture(), scene.at, stride, scene.title(f"stage {number}")
        )
        for number, (stage, stride) in enumerate(zip(scene.records(), scene.strides, strict=True), start=1)
    }


def draw_rollout(scene: Scene) -> dict[str, "Figure"]:
    heat, title = attention.rollout(scene.records()), scene.title("attention rollout", query=False)
    return {"rollout": drawing.overlay_figure(scene.picture(), heat, title)}


def draw_gradcam(scene: Scene) -> dict[str, "Figure"]:
    target, stage = scene.args.target, scene.args.stage
    with torch.no_grad():
        logits = scene.model(scene.input)[0].cpu()
    if target is not None and not 0 <= target < len(logits):
        raise ValueError(f"--target: expected a class from 0 to {len(logits) - 1}, got {target}")
    if stage is not None and not 1 <= stage <= len(scene.maps):
        raise ValueError(f"--stage: expected a stage from 1 to {len(scene.maps)}, got {stage}")
    target = int(logits.argmax()) if target is None else target
    heat = attention.grad_cam(scene.model, scene.input, target, (stage or len(scene.maps)) - 1)
    name = predict.class_names(scene.trained.config, scene.args.classes)[target].split(",")[0]
    title = scene.title(f"Grad-CAM for {name}", query=False)
    return {"gradcam": drawing.overlay_figure(scene.picture(), heat, title)}


KINDS: dict[str, Callable[[Scene], dict[str, "Figure"]]] = {
    "keys": draw_keys,
    "attention": draw_attention,
    "heads": draw_heads,
    "rollout": draw_rollout,
    "gradcam": draw_gradcam,
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("image", metavar="IMAGE", help="image file")
    predict.add_model_arguments(parser)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="pictures (all)")
    parser.add_argument("--at", nargs=2, type=int, metavar=("X", "Y"), help="query's pixel (the centre)")
    parser.add_argument("--block", type=int, default=-1, help="block of each stage, from 0 (the last)")
    parser.add_argument("--stage", type=int, help="stage of Grad-CAM, from 1 (the last)")
    parser.add_argument("--target", type=int, metavar="CLASS", help="class of Grad-CAM (the likeliest)")
    parser.add_argument("--out", type=Path, default=Path("pictures"), metavar="DIR", help="folder (pictures)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 2 for what the user can correct."""
    args = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        scene = Scene(args)
        for kind in args.kinds:
            for name, figure in KINDS[kind](scene).items():
                drawing.save(figure, args.out / f"{name}.png")
                logger.info(f"wrote {args.out / name}.png")
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
