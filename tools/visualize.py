"""Draws what a Focal Transformer looks at in an image, as PNG files.

    python tools/visualize.py IMAGE --cfg FILE --kinds keys
    python tools/visualize.py IMAGE --resume CHECKPOINT [--cfg FILE] [--at X Y] [--out DIR]

keys       which tokens a query sees in each stage, at each granularity; needs no weights
attention  how its attention is divided among them, mean over heads
heads      the same by head, one file per stage
rollout    attention rollout: which pixels reach the classifier
gradcam    Grad-CAM: which pixels speak for a class

The image is resized and cropped as in evaluation; the query is a pixel of the result.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))  # the tools are run as files

import attention_figures as figures  # noqa: E402
import attention_maps as maps  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import utils  # noqa: E402
from classification import predict  # noqa: E402
from models import build_model  # noqa: E402

logger = logging.getLogger("visualize")


class Scene:
    """An image, a model that looks at it, and a pixel of interest."""

    def __init__(self, args: argparse.Namespace) -> None:
        """
        Args:
            args: of the command line.

        Raises:
            OSError: a file cannot be read.
            ValueError: what was asked for cannot be drawn.
        """
        self.args = args
        if needs_weights(args.kinds) or args.resume:
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
        self.maps = maps.stage_maps(self.model, height, width, args.block)
        self.strides = maps.strides(self.model)
        self.where = f"{Path(args.image).name}, query at {self.at[0]}, {self.at[1]}"

    def picture(self) -> np.ndarray:
        """The input as an image, [H, W, 3] in [0, 1]."""
        data = self.trained.config.DATA
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.MEAN, data.STD))
        if self.input.shape[1] == 1:
            mean, std = mean.mean(dim=0, keepdim=True), std.mean(dim=0, keepdim=True)
        pixels = (self.input[0].cpu() * std + mean).clamp(0, 1).expand(3, -1, -1)
        return pixels.permute(1, 2, 0).numpy()

    def records(self) -> list[list[maps.BlockAttention]]:
        """What every block computed with, by stage."""
        with maps.recording(self.model) as records, torch.no_grad():
            self.model(self.input)
        return records

    def logits(self) -> Tensor:
        """[classes]."""
        with torch.no_grad():
            return self.model(self.input)[0].cpu()


def draw_keys(scene: Scene) -> dict[str, "figures.Figure"]:
    """By file name."""
    title = f"{scene.trained.config.MODEL.NAME}: the keys of a query, {scene.where}"
    figure = figures.keys_figure([("", scene.maps)], scene.picture(), scene.at, scene.strides, title)
    return {"keys": figure}


def draw_attention(scene: Scene) -> dict[str, "figures.Figure"]:
    """By file name."""
    chosen = [stage[scene.args.block] for stage in scene.records()]
    title = f"{scene.trained.config.MODEL.NAME}: mean over heads, {scene.where}"
    drawn = figures.attention_figure(chosen, scene.picture(), scene.at, scene.strides, title)
    return {"attention": drawn}


def draw_heads(scene: Scene) -> dict[str, "figures.Figure"]:
    """By file name."""
    drawn = {}
    for number, stage in enumerate(scene.records()):
        title = f"{scene.trained.config.MODEL.NAME}, stage {number + 1}: {scene.where}"
        drawn[f"heads_stage{number + 1}"] = figures.heads_figure(
            stage[scene.args.block], scene.picture(), scene.at, scene.strides[number], title
        )
    return drawn


def draw_rollout(scene: Scene) -> dict[str, "figures.Figure"]:
    """By file name."""
    heat = maps.rollout(scene.records())
    title = f"{scene.trained.config.MODEL.NAME}: attention rollout, {Path(scene.args.image).name}"
    return {"rollout": figures.overlay_figure(scene.picture(), heat, title)}


def draw_gradcam(scene: Scene) -> dict[str, "figures.Figure"]:
    """By file name."""
    logits, target, stage = scene.logits(), scene.args.target, scene.args.stage
    if target is not None and not 0 <= target < len(logits):
        raise ValueError(f"--target: expected a class from 0 to {len(logits) - 1}, got {target}")
    if not -len(scene.maps) <= stage - (stage > 0) < len(scene.maps) or stage == 0:
        raise ValueError(f"--stage: expected a stage from 1 to {len(scene.maps)}, got {stage}")
    target = int(logits.argmax()) if target is None else target
    name = predict.class_names(scene.trained.config, scene.args.classes)[target]
    heat = maps.grad_cam(scene.model, scene.input, target, stage - (stage > 0))
    title = f"{scene.trained.config.MODEL.NAME}: Grad-CAM for {name.split(',')[0]}"
    return {"gradcam": figures.overlay_figure(scene.picture(), heat, title)}


KINDS: dict[str, Callable[[Scene], dict[str, "figures.Figure"]]] = {
    "keys": draw_keys,
    "attention": draw_attention,
    "heads": draw_heads,
    "rollout": draw_rollout,
    "gradcam": draw_gradcam,
}


def needs_weights(kinds: Sequence[str]) -> bool:
    """Whether any of these pictures is of a trained model."""
    return set(kinds) != {"keys"}


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
    parser.add_argument("--stage", type=int, default=-1, help="stage of Grad-CAM, from 1 (the last)")
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
                figures.save(figure, args.out / f"{name}.png")
                logger.info(f"wrote {args.out / name}.png")
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("FOCAL_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
