"""Writes a model as a torch.export program, an ONNX file and a TorchScript file, each checked first.

    python classification/export.py --resume CHECKPOINT --out DIR [--cfg FILE] [--formats onnx] [--size H W]

PyTorch's exporters write the files. Each is loaded again and run on new images (ONNX by ONNX Runtime), and is
kept if its logits agree with the model's to 1e-4. Batches may have any length. A file has one input size,
because the table of the tokens that a window attends to is a constant of the file.

ONNX needs onnx, onnxscript and onnxruntime.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))  # the commands are run as files

import torch  # noqa: E402
from timm.layers import to_2tuple  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import utils  # noqa: E402
from classification.predict import load_config_of, load_model  # noqa: E402
from models.focal_transformer import check_images  # noqa: E402

TOLERANCE = 1e-4
EXAMPLE_BATCH = 2  # with 1, exporters would treat the length as a constant
CHECKED_BATCHES = (1, 3)  # other than the exporter's own
ANY_LENGTH = ({0: torch.export.Dim.DYNAMIC},)
"""`dynamic_shapes` of the exporters: batches of any length."""

Program = Callable[[Tensor], Tensor]
"""Images [B, C, H, W] to logits."""


@dataclass(frozen=True)
class Format:
    """A file format."""

    suffix: str
    write: Callable[[nn.Module, Tensor, Path], None]  # (model, images, file)
    load: Callable[[Path], Program]


def write_program(model: nn.Module, images: Tensor, path: Path) -> None:
    """By torch.export."""
    program = torch.export.export(model, (images,), dynamic_shapes=ANY_LENGTH, strict=False)
    with path.open("wb") as file:  # under a path, torch.export expects the ending .pt2
        torch.export.save(program, file)


def load_program(path: Path) -> Program:
    """By torch.export."""
    with path.open("rb") as file:
        return torch.export.load(file).module()


def write_onnx(model: nn.Module, images: Tensor, path: Path) -> None:
    """By torch.onnx, with the weights inside the file."""
    torch.onnx.export(
        model,
        (images,),
        path,
        dynamo=True,
        dynamic_shapes=ANY_LENGTH,
        input_names=["images"],
        output_names=["logits"],
        external_data=False,
        verbose=False,
    )


def load_onnx(path: Path) -> Program:
    """By ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def write_torchscript(model: nn.Module, images: Tensor, path: Path) -> None:
    """By torch.jit.trace."""
    torch.jit.save(torch.jit.trace(model, images), path)


FORMATS = {
    "torch_export": Format(".pt2", write_program, load_program),
    "onnx": Format(".onnx", write_onnx, load_onnx),
    "torchscript": Format(".torchscript.pt", write_torchscript, torch.jit.load),
}


@torch.no_grad()
def export_model(model: nn.Module, name: str, shape: tuple[int, int, int], path: Path) -> None:
    """Write a model in one format; if the file does not agree with the model, write nothing.

    Args:
        model: in evaluation mode on the CPU, float32.
        name: a key of `FORMATS`.
        shape: channels, rows and columns of an image.
        path: of the new file; an existing file is replaced.

    Raises:
        UserError: packages are missing, the exporter fails, or its result does not run or differs from the
            model.
        OSError: the file could not be written.
    """
    chosen, generator = FORMATS[name], torch.Generator().manual_seed(0)
    example, *unseen = (
        torch.randn(length, *shape, generator=generator) for length in (EXAMPLE_BATCH, *CHECKED_BATCHES)
    )
    with utils.atomic_write(path) as temporary:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the result is checked
                chosen.write(model, example, temporary)
                program = chosen.load(temporary)
                for images in unseen:
                    torch.testing.assert_close(
                        program(images),
                        model(images),
                        rtol=TOLERANCE,
                        atol=TOLERANCE,
                        msg=lambda text: f"for other images, the file differs: {' '.join(text.split())}",
                    )
        except OSError:
            raise
        except Exception as error:  # exporters raise nearly anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise utils.UserError(f"{name}: {reason}; nothing was written to {path}") from error


# --- Command line -------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    path = utils.path_argument
    parser.add_argument(
        "--cfg", type=path, metavar="FILE", help="yaml file (default: the one inside the checkpoint)"
    )
    parser.add_argument(
        "--resume", type=path, metavar="FILE", required=True, help="checkpoint, .pth or .safetensors"
    )
    parser.add_argument("--out", metavar="DIR", type=path, required=True, help="folder of the new files")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--size", nargs=2, type=int, metavar=("H", "W"), help="of the images (DATA.IMG_SIZE)")
    parser.add_argument(
        "--opts", nargs="+", action="extend", default=[], metavar="KEY VALUE", help="any option of config.py"
    )
    parser.set_defaults(data_path=None, device="cpu")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if a model cannot be exported, 2 for what the user can correct."""
    args = parse(arguments)
    utils.escape_output()
    try:
        return utils.run_command(lambda: export_formats(args))
    finally:
        logging.disable(logging.NOTSET)


def export_formats(args: argparse.Namespace) -> int:
    """Run the parsed command; 1 if a format does not fit the model."""
    config = load_config_of(args)
    height, width = args.size or to_2tuple(config.DATA.IMG_SIZE)
    if min(height, width) < 1:
        raise utils.UserError(f"--size: expected rows and columns in pixels, got {height} {width}")
    model = load_model(config).eval()
    with utils.user_input():
        check_images(torch.empty(1, model.in_chans, height, width, device="meta"), model.smallest_side)
    logging.disable(logging.WARNING)  # of the exporters; `main` takes it back
    status = 0
    for name in args.formats:
        path = Path(args.out) / f"{config.MODEL.NAME}_{height}x{width}{FORMATS[name].suffix}"
        try:
            export_model(model, name, (model.in_chans, height, width), path)
            print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB", flush=True)
        except utils.UserError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
