"""Writes a model as a torch.export program, an ONNX file and a TorchScript file, each checked first.

    python classification/export.py --resume CHECKPOINT --out DIR [--cfg FILE] [--formats onnx] [--size H W]

What is written has been read again, run on images that the exporter did not see, with ONNX Runtime for ONNX,
and agrees with the model to 1e-4 (of its largest logit, if that is more than 1). Batches may have any length
unless --batch fixes it. Every format has one input size: which tokens a window attends to is a table that is
worked out for a size, in Python, and becomes a constant of the file.

ONNX needs onnx, onnxscript and onnxruntime.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))  # the commands are run as files

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from classification.predict import load_config_of, load_model  # noqa: E402
from models import build_model  # noqa: E402
from models.focal_attention import FocalAttention  # noqa: E402
from models.layers import PatchEmbed  # noqa: E402

TOLERANCE = 1e-4
CHECKED_BATCHES = (1, 3)  # other than the exporter's own
EXAMPLE_BATCH = 2  # of one image, exporters would take the length for a constant
LONGEST_BATCH = 2**20  # PyTorch 2.6 wants a bound
TIMED_RUNS = 7

Program = Callable[[Tensor], Tensor]
"""Images [B, C, H, W] to logits."""


class ExportError(ValueError):
    """A format that cannot be written, and why."""


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        suffix: ending of its name.
        write: (model, example images, whether batches may have any length, path) -> the file is there.
        load: file -> program.
        packages: what has to be installed for it, besides PyTorch.
    """

    suffix: str
    write: Callable[[nn.Module, Tensor, bool, Path], None]
    load: Callable[[Path], Program]
    packages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Written:
    """A file that was checked."""

    path: Path
    difference: float  # the largest between its logits and the model's
    milliseconds: float  # for one image
    eager_milliseconds: float

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.path.stat().st_size / 2**20:.1f} MiB, differs by at most "
            f"{self.difference:.1e}, {self.milliseconds:.1f} ms an image (the model itself "
            f"{self.eager_milliseconds:.1f} ms)"
        )


# --- A model that exporters understand ----------------------------------------------------------------------


class ConvolvedPatches(PatchEmbed):
    """Patch embedding by a convolution on every device, which all formats know."""

    def _overlapping(self, x: Tensor) -> Tensor:
        return self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def plain_copy(model: nn.Module, example: Tensor) -> nn.Module:
    """The same function in plain operations: no kernels of our own, no gradients, tables worked out."""
    plain = copy.deepcopy(model).eval().requires_grad_(False)
    for module in plain.modules():
        if isinstance(module, PatchEmbed):
            module.__class__ = ConvolvedPatches
        elif isinstance(module, FocalAttention):
            module.backend = "reference"
    plain(example)
    return plain


# --- Formats ------------------------------------------------------------------------------------------------


def exported(model: nn.Module, example: Tensor, any_batch: bool) -> torch.export.ExportedProgram:
    """The program of torch.export, for the size of the example."""
    shapes = ({0: torch.export.Dim("batch", min=1, max=LONGEST_BATCH)},) if any_batch else None
    program = torch.export.export(model, (example,), dynamic_shapes=shapes, strict=False)
    program.graph.eliminate_dead_code()  # PyTorch 2.6 records questions about dtypes, and cannot save them
    return program


def write_program(model: nn.Module, example: Tensor, any_batch: bool, path: Path) -> None:
    """As `torch.export.save` does."""
    torch.export.save(exported(model, example, any_batch), path)


def load_program(path: Path) -> Program:
    """The module of a torch.export file."""
    return torch.export.load(path).module()


def write_onnx(model: nn.Module, example: Tensor, any_batch: bool, path: Path) -> None:
    """Through torch.export, with weights inside the file."""
    program = exported(model, example, any_batch)
    names = {"input_names": ["images"], "output_names": ["logits"]}
    torch.onnx.export(program, (example,), path, dynamo=True, external_data=False, verbose=False, **names)


def load_onnx(path: Path) -> Program:
    """A session of ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (entry.name for entry in session.get_inputs())
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def write_torchscript(model: nn.Module, example: Tensor, any_batch: bool, path: Path) -> None:
    """By tracing; the length of batches stays open whether asked for or not."""
    torch.jit.save(torch.jit.trace(model, example, check_trace=False), path)


def load_torchscript(path: Path) -> Program:
    """The traced module."""
    return torch.jit.load(path)


FORMATS = {
    "torch_export": Format(".pt2", write_program, load_program),
    "onnx": Format(".onnx", write_onnx, load_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "torchscript": Format(".torchscript.pt", write_torchscript, load_torchscript),
}


# --- Writing and checking -----------------------------------------------------------------------------------


def export_model(
    model: nn.Module, name: str, size: tuple[int, int], channels: int, path: Path, batch: int | None = None
) -> Written:
    """Write a model in one format, if it can be and agrees with the model; else nothing.

    Args:
        model: in evaluation mode on the CPU, float32.
        name: a key of `FORMATS`.
        size: rows and columns of the images, pixels.
        channels: of the images.
        path: of the new file, which is replaced if it is there.
        batch: the only length of batches; None for any.

    Raises:
        ExportError: packages are missing, the exporter fails, or its result does not run or is another
            function.
        OSError: the file could not be written.
    """
    chosen = FORMATS[name]
    missing = [package for package in chosen.packages if not _is_there(package)]
    if missing:
        raise ExportError(f"{name}: needs {', '.join(missing)}: pip install {' '.join(missing)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    images = _images(batch or EXAMPLE_BATCH, channels, size, seed=0)
    try:
        with _explained(f"{name}: the exporter cannot do this model"), _quietly():
            chosen.write(plain_copy(model, images), images, batch is None, temporary)
        lengths = CHECKED_BATCHES if batch is None else (batch, batch)
        one = _images(batch or 1, channels, size, seed=9)
        with _explained(f"{name}: {path} does not load and run", "; nothing was written"), _quietly():
            program = chosen.load(temporary)
            difference = max(
                _difference(model, program, _images(length, channels, size, seed), name)
                for seed, length in enumerate(lengths, start=1)
            )
            written = Written(path, difference, _milliseconds(program, one), _milliseconds(model, one))
        os.replace(temporary, path)
        return written
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _difference(model: nn.Module, program: Program, images: Tensor, name: str) -> float:
    """Largest difference of logits; ExportError where it is too large."""
    with torch.no_grad():
        expected, got = model(images), program(images)
    if got.shape != expected.shape:
        raise ExportError(
            f"{name}: for {len(images)} images it answers {list(got.shape)}, expected "
            f"{list(expected.shape)}; nothing was written"
        )
    difference = (got - expected).abs().max().item()
    allowed = TOLERANCE * max(1.0, expected.abs().max().item())
    if not difference <= allowed:
        raise ExportError(
            f"{name}: differs from the model by {difference:.1e} for {len(images)} images, allowed are "
            f"{allowed:.1e}; nothing was written"
        )
    return difference


def _images(batch: int, channels: int, size: tuple[int, int], seed: int) -> Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(seed))


def _milliseconds(program: Program, images: Tensor) -> float:
    """Median time for one image."""
    times = []
    with torch.no_grad():
        program(images)
        for _ in range(TIMED_RUNS):
            start = time.perf_counter()
            program(images)
            times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times) / len(images)


def _is_there(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


@contextlib.contextmanager
def _explained(what: str, consequence: str = "") -> Iterator[None]:
    """What fails inside as an ExportError; exporters and runtimes raise exceptions of any kind."""
    try:
        yield
    except (ExportError, OSError):
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(f"{what}: {reason}{consequence}") from error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporters' warnings, of which none is about this model: the result is checked instead."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


# --- Command line -------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cfg", metavar="FILE", help="yaml file (default: the one inside the checkpoint)")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--resume", metavar="FILE", help="checkpoint, .pth or .safetensors")
    weights.add_argument("--random", action="store_true", help="random weights, to try an exporter")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder of the new files")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument(
        "--size", nargs="+", metavar="PIXELS", help="side, or rows and columns (DATA.IMG_SIZE)"
    )
    parser.add_argument("--batch", type=int, metavar="N", help="the only length of batches (default: any)")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="any option of config.py")
    parser.set_defaults(data_path=None, device="cpu")
    return parser.parse_args(arguments)


def size_of(words: Sequence[str] | None, default: int | Sequence[int]) -> tuple[int, int]:
    """Rows and columns of `--size`.

    Raises:
        ValueError: something else than one or two numbers of pixels.
    """
    if words and any(not word.isdecimal() for word in words):
        raise ValueError(
            f"--size: expected one or two numbers of pixels, got {' '.join(words)}. A size that stays open "
            "cannot be exported, in any format: the tables of keys belong to one size; write a file for each"
        )
    sides = [int(word) for word in words] if words else [default] if isinstance(default, int) else [*default]
    if len(sides) not in (1, 2):
        raise ValueError(f"--size: expected one or two numbers of pixels, got {len(sides)}")
    return sides[0], sides[-1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Export; 1 if a format could not be written."""
    args = parse(arguments)
    failed = 0
    try:
        config = load_config_of(args)
        size = size_of(args.size, config.DATA.IMG_SIZE)
        if args.batch is not None and args.batch < 1:
            raise ValueError(f"--batch: expected at least 1, got {args.batch}")
        model = (load_model(config) if config.MODEL.RESUME else build_model(config)).eval()
        model(torch.zeros(1, model.in_chans, *size))  # says what is wrong with a size
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name in args.formats:
        path = args.out / f"{config.MODEL.NAME}_{size[0]}x{size[1]}{FORMATS[name].suffix}"
        try:
            print(export_model(model, name, size, model.in_chans, path, args.batch), flush=True)
        except (ExportError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
