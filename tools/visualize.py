"""Draws what a Focal Transformer looks at in an image, as PNG files.

    python -m tools.visualize IMAGE --cfg FILE --kinds keys
    python -m tools.visualize IMAGE --resume CHECKPOINT [--cfg FILE] [--at X Y] [--out DIR]

keys       which tokens a query sees in the last block of each stage; needs no weights
attention  how its attention is divided among them, mean over heads

The image is resized and cropped as in evaluation; the query is a pixel of the result.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import utils
from classification import predict
from data.build import evaluation_transform
from models import build_model
from tools.figures import attention, drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("keys", "attention")


def load(args: argparse.Namespace) -> predict.Trained:
    """The model of the command line, without weights where only keys are drawn and none are named."""
    if args.resume or set(args.kinds) != {"keys"}:
        return predict.load_trained(args)
    config = predict.load_config_of(args)
    with utils.user_input():
        model = build_model(config).eval()
    return predict.Trained(config, model, torch.device("cpu"), utils.Precision(torch.float32))


def draw(args: argparse.Namespace) -> Iterator[tuple[str, "Figure"]]:
    """The chosen figures, by file name.

    Raises:
        UserError: a file cannot be read, or the arguments do not fit the model.
    """
    trained = load(args)
    model, data = trained.model, trained.config.DATA
    with utils.user_input():
        transform = evaluation_transform(trained.config)
        image = predict.read_image(args.image, transform, data.EXIF_ORIENTATION)[None].to(trained.device)
    height, width = image.shape[2:]
    at = tuple(args.at) if args.at else (width // 2, height // 2)
    if not (0 <= at[0] < width and 0 <= at[1] < height):
        raise utils.UserError(
            f"--at: expected a pixel of the model's input, X below {width} and Y below {height}, got "
            f"{at[0]} {at[1]}"
        )
    maps = attention.stage_maps(model, height, width)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.MEAN, data.STD))
    if image.shape[1] == 1:
        mean, std = mean.mean(dim=0, keepdim=True), std.mean(dim=0, keepdim=True)
    pixels = (image[0].cpu() * std + mean).clamp(0, 1).expand(3, -1, -1)
    picture = pixels.permute(1, 2, 0).numpy()
    title = f"{trained.config.MODEL.NAME}, {Path(args.image).name},\nquery at {at[0]}, {at[1]}"
    if "keys" in args.kinds:
        yield "keys", drawing.keys_figure([("", maps)], picture, at, f"{title}: its keys")
    if "attention" in args.kinds:
        recorded = attention.record(model, image, maps)
        yield "attention", drawing.attention_figure(maps, recorded, picture, at, f"{title}: mean over heads")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 2 for what the user can correct."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("image", type=utils.path_argument, metavar="IMAGE", help="image file")
    predict.add_model_arguments(parser)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="pictures (all)")
    parser.add_argument("--at", nargs=2, type=int, metavar=("X", "Y"), help="query's pixel (the centre)")
    parser.add_argument(
        "--out", type=utils.path_argument, default="pictures", metavar="DIR", help="folder (pictures)"
    )
    args = parser.parse_args(argv)
    utils.escape_output()

    def draw_all() -> None:
        utils.keep_inputs([args.image], [Path(args.out, f"{name}.png") for name in args.kinds])
        drawing.blank_figure()  # says that matplotlib is missing before, not after reading the model
        for name, figure in draw(args):
            drawing.save(figure, Path(args.out, f"{name}.png"))

    return utils.run_command(draw_all)


if __name__ == "__main__":
    sys.exit(main())
