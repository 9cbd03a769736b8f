"""Convert weights between the original release's files, this repository's and safetensors.

    python -m tools.convert_checkpoint focal_tiny.pth focal_tiny.safetensors
    python -m tools.convert_checkpoint focal_tiny.safetensors focal_tiny.pth

Reads all three, and checkpoints of training runs. Writes by the ending of the name: `.safetensors`, or `.pth`
with the weights under `model`, as the original and timm expect. Index tables that follow from a model's
options are left out; the original reads such files with strict=False. `--weights model_ema` takes the
averaged weights of a training run.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from models.checkpoint import STATE_KEYS, read_checkpoint, state_dict_of
from models.safetensors_file import write_safetensors
from training.checkpoints import write_checkpoint
from utils import UserError, atomic_write, escape_output, path_argument, run_command, user_input

SUFFIXES = (".pth", ".safetensors")


def read_weights(source: Path, key: str = "") -> dict[str, Tensor]:
    """The weights in a file.

    Args:
        source: the file.
        key: of the weights in the file; empty for the usual ones. What weights under another key lack, such
            as buffers beside averaged parameters, is taken from the usual ones.

    Raises:
        UserError: there is no such file, or it is unreadable or without weights.
    """
    with user_input():
        content = read_checkpoint(source)
        if not key:
            return state_dict_of(content, str(source))
    groups = {name: value for name, value in content.items() if isinstance(value, Mapping)}
    if key not in groups:
        found = ", ".join(map(str, groups)) or "none"
        raise UserError(f"{source}: expected weights under {key!r}, found these groups: {found}")
    state: dict[str, Tensor] = {}
    with user_input():
        for name in (*[name for name in STATE_KEYS if name in groups][:1], key):  # of different prefixes
            state |= state_dict_of({"model": groups[name]}, str(source))
    return state


def convert(source: Path, target: Path, key: str = "", force: bool = False) -> dict[str, Tensor]:
    """Write the weights of `source` to `target`, whole or not at all; returns them.

    Raises:
        FileExistsError: `target` is there, and `force` is not set.
        OSError: the target could not be written.
        UserError: an unknown kind of target, or an unreadable source, or both are one file.
    """
    if target.suffix not in SUFFIXES:
        raise UserError(f"{target}: expected a name that ends in one of {', '.join(SUFFIXES)}")
    if target.exists() and not force:
        raise FileExistsError(f"{target} is there already: choose another name, or replace it with --force")
    state = read_weights(source, key)
    if target.exists() and target.samefile(source):
        raise UserError(f"{target}: expected another file than the source, which would be lost; rename it")
    if target.suffix == ".pth":
        write_checkpoint({"model": state}, target)
    else:
        with atomic_write(target) as temporary:
            write_safetensors(state, temporary)
    return state


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 2 for an error that the user can correct."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", type=path_argument, help="weights: .pth of any kind, or .safetensors")
    parser.add_argument("target", type=path_argument, help="new file, .pth or .safetensors")
    parser.add_argument("--weights", default="", help="where in the source, if not the usual place")
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    args = parser.parse_args(arguments)
    escape_output()

    def run() -> None:
        state = convert(Path(args.source), Path(args.target), args.weights, args.force)
        count, numbers = len(state), sum(value.numel() for value in state.values())
        print(f"{args.target}: {count} tensors, {numbers:,} numbers")

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
