"""tools/plot_run.py: what it reads, what it skips, and that a picture comes out."""

import json
import logging
import re
import struct
import sys
from pathlib import Path

import pytest
from conftest import REPO

sys.path.insert(0, str(REPO / "tools"))
import plot_run

PNG = b"\x89PNG\r\n\x1a\n"


def train(epoch: int, step: int, loss: float | None = 1.0, speed: float = 100.0) -> str:
    values = {"loss": loss, "lr": 0.1, "img_per_s": speed}
    return json.dumps({"kind": "train", "epoch": epoch, "step": step, **values})


def epoch(number: int, acc1: float = 50.0) -> str:
    values = {"loss": 1.0, "val_loss": 1.1, "acc1": acc1, "acc5": 90.0, "minutes": 30.0}
    return json.dumps({"kind": "epoch", "epoch": number, **values})


RUN = [train(0, 4), train(0, 9), epoch(0), train(1, 4), train(1, 9), epoch(1, 60.0)]


def write(folder: Path, lines: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def size_of(png: Path) -> tuple[int, int]:
    content = png.read_bytes()
    assert content.startswith(PNG)
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def test_positions_are_in_epochs(tmp_path: Path) -> None:
    metrics = plot_run.read_metrics(write(tmp_path, RUN))
    assert metrics.train_positions() == [0.5, 1.0, 1.5, 2.0]
    assert metrics.epoch_positions() == [1.0, 2.0]


def test_what_a_resumed_run_did_again_counts_once(tmp_path: Path) -> None:
    """Stopped in the second epoch, resumed at its beginning, with another logging interval."""
    lines = [*RUN[:5], train(1, 3, 7.0), train(1, 7, 7.0), train(1, 9, 7.0), epoch(1)]
    metrics = plot_run.read_metrics(write(tmp_path, lines))
    assert [record["loss"] for record in metrics.train] == [1.0, 1.0, 7.0, 7.0, 7.0]
    assert len(metrics.epochs) == 2
    metrics = plot_run.read_metrics(write(tmp_path, [*RUN, *RUN[:3]]))
    assert (len(metrics.train), len(metrics.epochs)) == (2, 1)


@pytest.mark.parametrize(
    "broken",
    [
        '{"kind": "train", "ep',
        "[]",
        "3",
        "",
        "\x00",
        '{"kind": "train", "epoch": 1}',
        '{"kind": "other", "epoch": 1}',
        '{"kind": "epoch", "epoch": "x"}',
        '{"kind": "epoch", "epoch": 1, "acc1": "high"}',
        '{"kind": "epoch", "epoch": null}',
    ],
)
def test_a_broken_line_is_named_and_skipped(
    broken: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        metrics = plot_run.read_metrics(write(tmp_path, [*RUN[:3], broken, *RUN[3:]]))
    assert (len(metrics.train), len(metrics.epochs)) == (4, 2)
    assert f"{tmp_path / 'metrics.jsonl'}:4: skipped" in caplog.text


def test_one_run(tmp_path: Path) -> None:
    folder = write(tmp_path / "demo" / "first", [*RUN, train(2, 4, None)])
    assert plot_run.main([str(folder)]) == 0
    width, height = size_of(folder / "plot.png")
    assert width > 800
    assert height > 800


def test_several_runs(tmp_path: Path) -> None:
    folders = [write(tmp_path / name / "default", RUN) for name in ("a", "b")]
    folders.append(write(tmp_path / "c" / "default", RUN[:1]))  # not one epoch yet
    out = tmp_path / "new" / "all.png"
    assert plot_run.main([*map(str, folders), "--out", str(out)]) == 0
    size_of(out)
    assert plot_run.name_runs(folders) == ["a/default", "b/default", "c/default"]
    assert plot_run.name_runs([folders[0], folders[0]]) == ["default", "default"]


def test_a_page_holds_everything(tmp_path: Path) -> None:
    """Curves, what was reached, what differs; a name is text, and nothing is fetched."""
    for name, options in (
        ("a<b>", "TAG: one\nTRAIN: {BASE_LR: 0.5, EPOCHS: 2}\n"),
        ("b", "TRAIN: {EPOCHS: 2}\n"),
    ):
        (write(tmp_path / name, RUN) / "config.yaml").write_text(options)
    write(tmp_path / "b", [train(0, 4, 3.0, 50.0), train(0, 9, 2.0, 70.0), train(1, 0, 2.5, 60.0)])
    out, picture = tmp_path / "page.html", tmp_path / "plot.png"
    folders = [str(tmp_path / name) for name in ("a<b>", "b")]
    assert plot_run.main([*folders, "--out", str(out), str(picture)]) == 0
    size_of(picture)
    page = out.read_text()
    assert page.count("<svg") == page.count("</svg>") == 1
    assert page.count("<table>") == 2
    assert "<b>" not in page and "a&lt;b&gt;" in page
    assert re.findall(r"<(?:script|link|img|iframe|object)\b|(?:src|href)=\"(?!#)|url\((?!#)", page) == []
    rows = [re.findall(r"<t[dh]>(.*?)</t[dh]>", line) for line in page.splitlines() if "<tr>" in line]
    assert rows[1] == ["a&lt;b&gt;", "2", "60.00", "1", "1.1", "100", "1.00"]
    assert rows[2] == ["b", "0", "-", "2.5", "-", "60", "0.00"]
    assert rows[3:] == [
        ["option", "a&lt;b&gt;", "b"],
        ["TAG", "one", "-"],
        ["TRAIN.BASE_LR", "0.5", "-"],
    ]


def test_a_page_of_one_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A configuration that cannot be read costs the table of options alone."""
    folder = write(tmp_path / "run", RUN)
    (folder / "config.yaml").write_text("TAG: [")
    assert plot_run.main([str(folder), "--out", str(folder / "page.html")]) == 0
    assert "config.yaml: skipped" in caplog.text
    page = (folder / "page.html").read_text()
    assert page.count("<table>") == 1


def test_the_average_is_drawn_where_there_is_one() -> None:
    run = plot_run.RunMetrics("x", [json.loads(train(0, 1))], [json.loads(epoch(0)), json.loads(epoch(1))])
    lines = len(plot_run.draw([run]).axes[1].lines)
    run.epochs[1]["acc1_ema"] = 70.0
    assert len(plot_run.draw([run]).axes[1].lines) == lines + 1


def test_the_best_accuracy_is_that_of_best_pth() -> None:
    """Which counts the average's as well, where there is one."""
    run = plot_run.RunMetrics("x", [], [json.loads(epoch(0, 60.0)), json.loads(epoch(1, 50.0))])
    for averaged, best in ((None, 60.0), (55.0, 60.0), (70.0, 70.0)):
        run.epochs[1]["acc1_ema"] = averaged
        assert plot_run.summary([run])[1][2] == f"{best:.2f}"
        labels = [line.get_label() for line in plot_run.draw([run]).axes[1].lines]
        assert labels[0] == "top-1, best 60.00 %"
        shown = [] if averaged is None else [f"top-1 of the average, best {averaged:.2f} %"]
        assert labels[2:] == shown
    assert plot_run.summary([plot_run.RunMetrics("x")])[1][2] == "-"


def test_several_runs_need_a_file(tmp_path: Path) -> None:
    folder = str(write(tmp_path, RUN))
    with pytest.raises(SystemExit) as caught:
        plot_run.main([folder, folder])
    assert caught.value.code == 2


def test_mistakes_are_explained(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert plot_run.main([str(tmp_path / "nowhere")]) == 2
    assert "got no folder" in caplog.text
    assert plot_run.main([str(tmp_path)]) == 2
    assert "got one without it" in caplog.text
    assert plot_run.main([str(write(tmp_path / "empty", []))]) == 2
    assert "got none" in caplog.text
    folder = write(tmp_path / "run", RUN)
    assert plot_run.main([str(folder), "--out", str(tmp_path / "plot.nonsense")]) == 2
    assert "nonsense" in caplog.text
