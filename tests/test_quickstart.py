"""classification/quickstart.ipynb runs from top to bottom, and shows its outputs on the web."""

import re
from pathlib import Path

import nbformat
import pytest
from conftest import REPO
from nbclient import NotebookClient

QUICKSTART = REPO / "classification" / "quickstart.ipynb"


def accuracies(notebook: nbformat.NotebookNode, cell_id: str) -> list[float]:
    """The percentages that a cell has printed."""
    (cell,) = (cell for cell in notebook.cells if cell.id == cell_id)
    return [float(value) for value in re.findall(r"([\d.]+) %", str(cell.outputs))]


def pictures(notebook: nbformat.NotebookNode) -> list[str]:
    """The cells that show a picture."""
    return [cell.id for cell in notebook.cells if "image/png" in str(cell.get("outputs"))]


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For one epoch, in a folder where the repository's files are links, and everything new is a file."""
    for entry in REPO.iterdir():
        if entry.name not in ("output", "demo", ".venv", ".git"):
            (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.delenv("PT_OUTPUT_DIR", raising=False)
    notebook = nbformat.read(QUICKSTART, as_version=4)
    for cell in notebook.cells:
        cell.outputs = []
        cell.source = cell.source.replace('"TRAIN.EPOCHS", "6"', '"TRAIN.EPOCHS", "1"')
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    assert pictures(notebook) == ["keys", "predict", "attention"]
    for trained in ("accuracy", "compare"):
        (found,) = accuracies(notebook, trained)
        assert 0 <= found <= 100


def test_its_outputs_are_committed() -> None:
    """They are shown on the web: small, without errors, warnings or paths of a machine."""
    assert QUICKSTART.stat().st_size < 300_000
    notebook = nbformat.read(QUICKSTART, as_version=4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert pictures(notebook) == ["keys", "predict", "attention"]
    assert all(accuracies(notebook, trained)[-1] > 70 for trained in ("accuracy", "compare"))
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}
    assert not re.search(r"/(home|root|tmp|work|Users)/", QUICKSTART.read_text(encoding="utf-8"))
