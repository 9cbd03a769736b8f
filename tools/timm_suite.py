"""Run timm's own model tests over the variants of this repository.

    python tools/timm_suite.py path/to/timm/tests

The tests are those of timm's sources (tests/test_models.py of the release that is installed); they come with
the source archive of timm, not with its wheel. Only `timm.list_models` is changed for them: it lists our
names alone, and counts them among the models with `forward_intermediates`. Tests that script a model with
TorchScript are left out, as timm leaves out models that cannot be scripted: ours refuse, with an error that
says what to do instead. Further arguments go to pytest.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import timm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import models  # noqa: E402  (registers the variants)

OUTCOMES = ("passed", "failed", "skipped", "error")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("tests", type=Path, help="folder of timm's tests, or its test_models.py")
    parser.add_argument("--models", default="focal*", help="only variants of this pattern")
    args, args.rest = parser.parse_known_args(arguments)
    return args


def listing_only(names: list[str]) -> Any:
    """A stand-in for `timm.list_models` that knows `names` alone."""
    original = timm.list_models

    def list_models(filter: Any = "", module: Any = "", **options: Any) -> list[str]:
        modules = [module] if isinstance(module, str) else [*module, "registry"]
        found = {name for part in modules for name in original(filter, module=part, **options)}
        return sorted(name for name in found if name.split(".")[0] in names)

    return list_models


class Tally:
    """Counts outcomes by name of the test."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep the tests of our models, and of those what can pass."""
        items[:] = [
            item
            for item in items
            if getattr(item, "callspec", None) is not None
            and str(item.callspec.params.get("model_name", "")).startswith("focal")
            and not fnmatch(item.originalname, "*torchscript*")
        ]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count the test itself, and what keeps it from running."""
        if report.when == "call" or not report.passed:
            name = report.nodeid.split("::")[-1].split("[")[0]
            self.counts.setdefault(name, Counter())[report.outcome] += 1

    def lines(self) -> list[str]:
        """The table."""
        rows = [
            f"{name:44} " + ", ".join(f"{count[outcome]} {outcome}" for outcome in OUTCOMES if count[outcome])
            for name, count in sorted(self.counts.items())
        ]
        total = sum(self.counts.values(), Counter())
        return [*rows, "in all " + ", ".join(f"{total[key]} {key}" for key in OUTCOMES if total[key])]


def main(arguments: list[str] | None = None) -> int:
    """Run; the exit status is pytest's."""
    args = parse(arguments)
    file = args.tests / "test_models.py" if args.tests.is_dir() else args.tests
    if not file.is_file():
        raise SystemExit(f"{file}: expected timm's test_models.py; unpack the source archive of timm")
    names = [name for name in models.VARIANTS if fnmatch(name, args.models)]
    if not names:
        raise SystemExit(f"--models {args.models}: expected a pattern of {', '.join(models.VARIANTS)}")
    timm.list_models = listing_only(names)
    tally = Tally()
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore", *args.rest]
    status = pytest.main([str(file), "--rootdir", str(file.parent), *options], plugins=[tally])
    print(f"timm {timm.__version__}, {len(names)} models, tests that script them left out")
    print("\n".join(tally.lines()))
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
