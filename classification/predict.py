"""Names the likeliest classes of images, as a table or as JSON.

    python classification/predict.py IMAGE|FOLDER ... --resume CHECKPOINT [--cfg FILE] [--json]

Checkpoints are those that main.py evaluates. A training checkpoint of this project holds its configuration,
so that --cfg is not needed; weights alone, and files of the original release, need it. For an image that
cannot be read an error is printed; the others are predicted, and the exit status is 1.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))  # the commands are run as files

import torch  # noqa: E402
from timm.data import ImageNetInfo, infer_imagenet_subset  # noqa: E402
from torch import Tensor  # noqa: E402
from yacs.config import CfgNode  # noqa: E402

import utils  # noqa: E402
from config import flatten, load_config  # noqa: E402
from data.build import evaluation_transform  # noqa: E402
from data.folder import class_folders, home, list_images  # noqa: E402
from data.images import decode_rgb, log_left_out  # noqa: E402
from data.source import SPLITS, FileSource  # noqa: E402
from data.transforms import Transform  # noqa: E402
from models import FocalTransformer, build_model, load_checkpoint, read_checkpoint  # noqa: E402

logger = logging.getLogger("predict")

NAME_WIDTH = 60  # letters of a class name in the table


@dataclass(frozen=True)
class Trained:
    """A model with loaded weights, its configuration, device and precision."""

    config: CfgNode
    model: FocalTransformer
    device: torch.device
    precision: utils.Precision


@dataclass
class Prediction:
    """The likeliest classes of an image, best first, or the reason why it could not be read."""

    image: str
    top: list[tuple[int, str, float]]  # class, its name, probability
    error: str = ""

    def as_json(self) -> dict[str, object]:
        """As a dict for JSON."""
        if self.error:
            return {"image": self.image, "error": self.error}
        top = [{"class": number, "name": name, "probability": share} for number, name, share in self.top]
        return {"image": self.image, "top": top}

    def as_text(self) -> str:
        """The image's name and one line per class."""
        lines = [f"  {100 * share:5.1f} %  {name[:NAME_WIDTH]}" for _, name, share in self.top]
        return "\n".join([self.image, *lines])


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `load_config_of`, `load_trained` and `class_names` need."""
    path = utils.path_argument
    parser.add_argument(
        "--cfg", type=path, metavar="FILE", help="yaml file (default: the one inside the checkpoint)"
    )
    parser.add_argument("--resume", type=path, metavar="FILE", help="checkpoint, as for main.py --eval")
    parser.add_argument(
        "--opts", nargs="+", action="extend", default=[], metavar="KEY VALUE", help="any option of config.py"
    )
    parser.add_argument("--data-path", metavar="DIR", help="data set whose folders name the classes")
    parser.add_argument("--device", help="as for main.py (default: the accelerator if there is one)")
    parser.add_argument("--classes", type=path, metavar="FILE", help="class names, one per line")


def load_config_of(args: argparse.Namespace) -> CfgNode:
    """The configuration of --cfg, else of the checkpoint, overridden by --opts and the flags.

    Raises:
        UserError: neither of them has one, or it has problems, or there is no such folder of data.
    """
    flags = {"MODEL.RESUME": args.resume, "DATA.DATA_PATH": args.data_path, "DEVICE": args.device}
    flags = {key: value for key, value in flags.items() if value}
    if args.data_path and not Path(utils.expand_path(args.data_path)).is_dir():
        raise utils.UserError(f"--data-path: expected a folder, got {args.data_path}; check the path")
    with utils.user_input():
        if args.cfg:
            return load_config(args.cfg, args.opts, flags)
        text = read_checkpoint(args.resume).get("config") if args.resume else None
        if not isinstance(text, str):
            where = f"{args.resume} holds no configuration" if args.resume else "no --resume was given either"
            raise utils.UserError(f"--cfg: expected a yaml file, as {where}; name the config of the model")
        saved = chain.from_iterable(flatten(CfgNode.load_cfg(text)).items())
        return load_config(None, [*saved, *args.opts], flags)


def load_model(config: CfgNode) -> FocalTransformer:
    """The model of a configuration, with the weights of MODEL.RESUME.

    Raises:
        UserError: no such checkpoint, or it does not fit the configuration.
    """
    with utils.user_input():
        model = build_model(config)
    with utils.user_input("MODEL.RESUME (--resume)"):
        load_checkpoint(model, config.MODEL.RESUME)
    return model


def load_trained(args: argparse.Namespace) -> Trained:
    """The model with its weights, in evaluation mode, on its device.

    Raises:
        UserError: no checkpoint was named, there is none, or it does not fit the configuration.
    """
    config = load_config_of(args)
    if not config.MODEL.RESUME:
        raise utils.UserError(
            "--resume: expected a checkpoint, got none; name the file with the trained weights"
        )
    device = utils.pick_device(config.DEVICE)
    model = load_model(config)
    precision = utils.choose_precision(config.AMP_OPT_LEVEL, config.AMP_DTYPE, device)
    model = model.to(device).eval()
    with utils.user_input(), torch.no_grad():
        model.attention_backends(precision.dtype)  # a named one may not run here
    return Trained(config, model, device, precision)


# --- Names of classes ---------------------------------------------------------------------------------------


def class_names(config: CfgNode, file: str | Path | None) -> list[str]:
    """One name per class, from a file, ImageNet or the data set's folders; else its number.

    Args:
        config: of the model; its DATA section tells whether the classes are ImageNet's.
        file: one name per line; None to look elsewhere.

    Raises:
        UserError: the file cannot be read, or has another number of names.
    """
    count = config.MODEL.NUM_CLASSES
    if file is not None:
        return _names_of_file(Path(file), count)
    names = [] if config.DATA.DATASET == "folder" else _imagenet_names(count)
    names = names or _folder_names(config.DATA.DATA_PATH, count)
    if not names:
        logger.warning(
            f"no names are known for these {count} classes, so they are numbered; name the data set's folder "
            "with --data-path, or a file with one name per line with --classes"
        )
    return names or [f"class {number}" for number in range(count)]


def _names_of_file(file: Path, count: int) -> list[str]:
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise utils.UserError(
            f"--classes: expected a text file with one name per line, got: {error}"
        ) from error
    if len(names) != count:
        raise utils.UserError(f"--classes: expected {count} names, one per class, got {len(names)} in {file}")
    return names


def _imagenet_names(count: int) -> list[str]:
    """Descriptions in the order of ImageNet's sorted folders, by timm; empty for other numbers of classes."""
    subset = infer_imagenet_subset({"num_classes": count})
    return ImageNetInfo(subset).label_descriptions() if subset else []


def _folder_names(data_path: str, count: int) -> list[str]:
    """Names of the class folders, if there is one per class; ImageNet's ids become descriptions."""
    for split in ("train", *SPLITS["val"]) if data_path else ():
        try:
            folder = home(Path(data_path)) / split
            names = class_folders(folder) if folder.is_dir() else []
        except OSError:  # another user's, whose checkpoint names it
            return []
        if len(names) == count:
            known = ImageNetInfo("imagenet-22k")
            described = dict(zip(known.label_names(), known.label_descriptions(), strict=True))
            return [described.get(name, name) for name in names]
    return []


# --- Images -------------------------------------------------------------------------------------------------


def find_images(arguments: Sequence[str]) -> list[str]:
    """The files that were named, and the image files in and below the folders that were named.

    Raises:
        UserError: a folder without images.
        OSError: a folder that cannot be read.
    """
    images: list[str] = []
    for argument in arguments:
        found = [argument]
        if Path(argument).is_dir():
            left_out: list[str] = []
            found = [str(Path(argument, image)) for image in list_images(Path(argument), left_out)]
            log_left_out(argument, left_out)
        if not found:
            raise utils.UserError(
                f"{argument}: expected images, got none; name image files, or a folder of them"
            )
        images += found
    return images


def read_image(path: str, transform: Transform, upright: bool) -> Tensor:
    """An image file as the model's input, [C, H, W]; turned as its EXIF data say if `upright`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it does not decode.
    """
    return transform(decode_rgb(FileSource(Path(), [path], [0]).read(0), path, upright))


def predict(
    trained: Trained, images: Sequence[str], names: Sequence[str], batch_size: int, top: int
) -> Iterator[Prediction]:
    """Predictions in the order of the images.

    Args:
        trained: the model.
        images: paths of files.
        names: one per class.
        batch_size: images per forward pass.
        top: classes per image; all classes if there are fewer.
    """
    with utils.user_input():
        transform, upright = evaluation_transform(trained.config), trained.config.DATA.EXIF_ORIENTATION
    for start in range(0, len(images), batch_size):
        predictions = [Prediction(path, []) for path in images[start : start + batch_size]]
        inputs = []
        for prediction in predictions:
            try:
                inputs.append(read_image(prediction.image, transform, upright))
            except OSError as error:
                prediction.error = f"{prediction.image}: expected an image file, got: {error.strerror}"
            except ValueError as error:
                prediction.error = str(error)
        if inputs:
            with torch.no_grad(), trained.precision.autocast(trained.device):
                logits = trained.model(torch.stack(inputs).to(trained.device)).float().cpu()
            shares, classes = logits.softmax(dim=-1).topk(min(top, len(names)))
            readable = [prediction for prediction in predictions if not prediction.error]
            for prediction, *found in zip(readable, classes.tolist(), shares.tolist(), strict=True):
                prediction.top = [
                    (number, names[number], share) for number, share in zip(*found, strict=True)
                ]
            for prediction, fits in zip(readable, logits.isfinite().all(dim=-1).tolist(), strict=True):
                if not fits:
                    prediction.top = []
                    prediction.error = (
                        f"{prediction.image}: expected finite outputs, got nan or inf; use other weights, or "
                        "full precision (--opts AMP_OPT_LEVEL O0)"
                    )
        yield from predictions


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "images",
        type=utils.path_argument,
        nargs="+",
        metavar="IMAGE|FOLDER",
        help="image files, or folders of them",
    )
    add_model_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at once (32)")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="classes per image (5)")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    args = parser.parse_args(argv)
    for flag in ("batch_size", "top"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')}: expected a number from 1 on")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 1 if an image could not be read, 2 after other mistakes of the user."""
    args = parse(argv)
    utils.escape_output()
    logging.basicConfig(format="%(message)s")
    return utils.run_command(lambda: predict_and_print(args))


def predict_and_print(args: argparse.Namespace) -> int:
    """Run the parsed command; 1 if an image could not be read."""
    images = find_images(args.images)
    trained = load_trained(args)
    names = class_names(trained.config, args.classes)
    done = []
    for prediction in predict(trained, images, names, args.batch_size, args.top):
        done.append(prediction)
        if prediction.error:
            print(f"error: {prediction.error}", file=sys.stderr)
        elif not args.json:
            print(prediction.as_text())
    if args.json:
        print(json.dumps([prediction.as_json() for prediction in done], indent=2))
    return 1 if any(prediction.error for prediction in done) else 0


if __name__ == "__main__":
    sys.exit(main())
