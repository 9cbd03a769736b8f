"""tools/plot_run.py: what it reads and skips, and that it draws a picture."""

import json
import logging
from pathlib import Path

import pytest
from PIL import Image

from tools import plot_run


def train(epoch: int, step: int, loss: float | None = 1.0, steps: int = 10) -> str:
    values = {"loss": loss, "lr": 0.1, "img_per_s": 100.0, "steps_per_epoch": steps}
    return json.dumps({"kind": "train", "epoch": epoch, "step": step, **values})


def epoch(number: int, acc1: float = 50.0) -> str:
    values = {"loss": 1.0, "val_loss": 1.1, "acc1": acc1, "acc5": 90.0, "minutes": 30.0}
    return json.dumps({"kind": "epoch", "epoch": number, **values})


RUN = [train(0, 4), train(0, 9), epoch(0), train(1, 4), train(1, 9), epoch(1, 60.0)]


def write(folder: Path, lines: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def test_positions_are_in_epochs(tmp_path: Path) -> None:
    """Also in a first epoch that has not ended, and after the batch size has changed."""
    metrics = plot_run.read_metrics(write(tmp_path, [*RUN, train(2, 1, steps=4), train(2, 3, steps=4)]))
    assert [record["end"] for record in metrics.train] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert [record["end"] for record in metrics.epochs] == [1.0, 2.0]


def test_a_damaged_line_is_named_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A power loss may leave zeros, a killed run a part of its last line."""
    lines = [*RUN[:3], "\x00", "3", '{"kind": "train"}', *RUN[3:], RUN[0][:20]]
    with caplog.at_level(logging.WARNING):
        metrics = plot_run.read_metrics(write(tmp_path, lines))
    assert (len(metrics.train), len(metrics.epochs)) == (4, 2)
    for line in (4, 5, 6, 10):
        assert f"{tmp_path / 'metrics.jsonl'}:{line}: skipped" in caplog.text


def test_several_runs(tmp_path: Path) -> None:
    lines = [*RUN, train(2, 4, None)]
    folders = [write(tmp_path / name / "default", lines) for name in ("a", "b")]
    folders.append(write(tmp_path / "c" / "default", RUN[:1]))  # not one epoch yet
    out = tmp_path / "new" / "all.png"
    assert plot_run.main([*map(str, folders), "--out", str(out)]) == 0
    Image.open(out).verify()


def test_the_best_accuracies_are_in_the_legend() -> None:
    """Also that of the average, where there is one."""
    epochs = [json.loads(epoch(number, 60.0 - number)) | {"end": number + 1} for number in (0, 1)]
    run = plot_run.RunMetrics("x", [], epochs)
    for averaged, labels in ((None, []), (70.0, ["top-1 of the average, best 70.00 %"])):
        run.epochs[1]["acc1_ema"] = averaged
        lines = [line.get_label() for line in plot_run.draw([run]).axes[1].lines]
        assert lines == ["top-1, best 60.00 %", *labels, "top-5"]


def test_mistakes_are_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, empty = str(write(tmp_path / "run", RUN)), str(write(tmp_path / "empty", []))
    for words, message in (
        ([str(tmp_path / "nowhere")], "got no folder"),
        ([str(tmp_path)], "got one without it"),
        ([empty], "got none"),
        ([run, "--out", str(tmp_path / "plot.nonsense")], "nonsense"),
    ):
        assert plot_run.main(words) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plot_run.main([run, run])
    assert "--out is needed" in capsys.readouterr().err
