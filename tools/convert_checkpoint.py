"""Convert weights between the original release's files, this codebase's and safetensors.

    python tools/convert_checkpoint.py focal_tiny.pth focal_tiny.safetensors
    python tools/convert_checkpoint.py focal_tiny.safetensors focal_tiny.pth

Reads all three, and checkpoints of training runs, and writes by the ending of the name: `.safetensors`, or
`.pth` with the weights under `model`, which is where this codebase, the original and timm look. Index tables
that follow from a model's options are left out; the original makes them itself, and reads such files with
strict=False, as its main.py does. `--weights model_ema` takes the averaged weights of a training run.

The new file is read again and compared with the old one bit by bit before it gets its name.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models.checkpoint import STATE_KEYS, read_checkpoint, state_dict_of  # noqa: E402
from models.safetensors_file import write_safetensors  # noqa: E402
from training.checkpoints import write_checkpoint  # noqa: E402


def write_pth(state: Mapping[str, Tensor], path: Path) -> None:
    """Weights under `model`."""
    write_checkpoint({"model": dict(state)}, path)


WRITERS: dict[str, Callable[[Mapping[str, Tensor], Path], None]] = {
    ".pth": write_pth,
    ".safetensors": write_safetensors,
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", type=Path, help="weights: .pth of any kind, or .safetensors")
    parser.add_argument("target", type=Path, help="new file, .pth or .safetensors")
    parser.add_argument("--weights", default="", help="where in the source, if not the usual place")
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    return parser.parse_args(arguments)


def read_weights(source: Path, place: str = "") -> dict[str, Tensor]:
    """The weights in a file.

    Args:
        source: the file.
        place: under which key they lie; empty for the usual ones. What another place lacks of the weights in
            the usual one, such as buffers beside averaged parameters, is taken from there.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable, or without weights.
    """
    content = read_checkpoint(source)
    if not place:
        return state_dict_of(content, str(source))
    if not isinstance(content.get(place), Mapping):
        found = ", ".join(str(key) for key, value in content.items() if isinstance(value, Mapping)) or "none"
        raise ValueError(f"{source}: expected weights under {place!r}, found these groups: {found}")
    usual = next((content[key] for key in STATE_KEYS if isinstance(content.get(key), Mapping)), {})
    return state_dict_of({"model": dict(usual) | dict(content[place])}, str(source))


def convert(source: Path, target: Path, place: str = "", force: bool = False) -> dict[str, Tensor]:
    """Write the weights of `source` to `target`, whole or not at all; returns them.

    Raises:
        FileExistsError: `target` is there, and `force` is not set.
        FileNotFoundError: no such source.
        OSError: the target could not be written.
        ValueError: an unknown kind of target, an unreadable source, or a target that reads differently.
    """
    if target.suffix not in WRITERS:
        raise ValueError(f"{target}: expected a name that ends in one of {', '.join(WRITERS)}")
    if target.exists() and not force:
        raise FileExistsError(f"{target} is there already: choose another name, or replace it with --force")
    state = read_weights(source, place)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.stem}.tmp{target.suffix}")
    try:
        WRITERS[target.suffix](state, temporary)
        _flush(temporary)
        check_same(state, state_dict_of(read_checkpoint(temporary), str(target)), str(target))
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return state


def check_same(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], origin: str) -> None:
    """Raise ValueError unless two state dicts agree in names, kinds, shapes and every bit."""
    differ = [key for key in expected.keys() | found.keys() if not _same(expected.get(key), found.get(key))]
    if differ:
        raise ValueError(
            f"{origin}: what was written reads differently in {len(differ)} tensors, such as {min(differ)}; "
            "nothing was kept. Check the disk"
        )


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(x: Tensor) -> Tensor:
    """As bytes, of which those of nan equal themselves."""
    return x.contiguous().flatten().view(torch.uint8)


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def main(arguments: list[str] | None = None) -> int:
    """Convert; says what was written, or what is wrong."""
    args = parse(arguments)
    try:
        state = convert(args.source, args.target, args.weights, args.force)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    numbers = sum(value.numel() for value in state.values())
    print(f"{args.target}: {len(state)} tensors, {numbers:,} numbers, read again and equal to {args.source}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
