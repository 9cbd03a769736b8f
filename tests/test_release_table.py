"""tools/benchmarks/release_table: ViL is ViL, and every model of the release has its row."""

from pathlib import Path

import pytest
import timm
import torch
from conftest import REPO, csv_rows
from torch import Tensor

from tools.benchmarks import common, entries, models, release_table, vil

CPU = torch.device("cpu")

# --- ViL ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "params_m", "macs_g"),
    [("ViL-Small", 24.6, 4.86), ("ViL-Medium", 39.7, 8.7), ("ViL-Base", 55.7, 13.4)],
)
def test_counts_of_vil(label: str, params_m: float, macs_g: float) -> None:
    """As its paper has them, which does not count products with zeros beyond the map."""
    entry = entries.Entry(label, release_table.MODELS[label].source, "")
    macs, built = entries.multiply_adds(entry, 224), entries.build(entry, 224)
    for module in built.modules():
        if isinstance(module, vil.SlidingAttention):
            hidden = int((~module.visible).sum()) * vil.SIDE**2  # pairs of a query and a zero
            macs -= 2 * hidden * module.qkv.in_features
    assert macs / 1e9 == pytest.approx(macs_g, rel=0.05)
    assert sum(p.numel() for p in built.parameters()) / 1e6 == pytest.approx(params_m, rel=0.005)


@pytest.mark.parametrize(("size", "global_tokens"), [((6, 8), 1), ((5, 3), 2), ((4, 4), 0)])
def test_sliding_attention_is_masked_attention(size: tuple[int, int], global_tokens: int) -> None:
    """Maps that chunks of 2 x 2 divide, and that they do not."""
    torch.manual_seed(0)
    attention = vil.SlidingAttention(8, 2, size, side=2)
    plain = vil.Attention(8, 2, qkv_bias=True)
    plain.load_state_dict(attention.state_dict())
    x = torch.randn(3, global_tokens + size[0] * size[1], 8, requires_grad=True)
    torch.testing.assert_close(attention(x), masked(plain, x, size, global_tokens))
    weights = torch.randn_like(x)
    found, expected = (
        torch.autograd.grad((out * weights).sum(), x)[0]
        for out in (attention(x), masked(plain, x, size, global_tokens))
    )
    torch.testing.assert_close(found, expected)


def masked(attention: vil.Attention, x: Tensor, size: tuple[int, int], global_tokens: int) -> Tensor:
    """Attention over all pairs of tokens, without those whose chunks are no neighbours."""
    row, column = torch.meshgrid(torch.arange(size[0]) // 2, torch.arange(size[1]) // 2, indexing="ij")
    chunk = torch.stack([row, column], dim=-1).flatten(0, 1)
    visible = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
    visible[global_tokens:, global_tokens:] = (chunk[:, None] - chunk).abs().amax(-1) <= 1
    q, k, v = attention.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-2, -1) / 2).masked_fill(~visible, float("-inf"))
    return attention.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


# --- The table ----------------------------------------------------------------------------------------------


def test_every_row_of_the_release_can_be_built() -> None:
    for source in (model.source for model in release_table.MODELS.values()):
        assert callable(source) or entries.config_file(source) or timm.is_model(source)


def test_the_model_zoo_quotes_the_same() -> None:
    """MODEL_ZOO.md: model, top-1, MACs, and images per second at three sizes."""
    page = (REPO / "MODEL_ZOO.md").read_text().partition("## Throughput")[2].partition("## COCO")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line[:1] == "|"]
    quoted = {name: (macs, *rates) for name, _, macs, *rates in rows[2:]}
    assert quoted == {
        name: (str(model.macs_g), *("" if rate is None else str(rate) for rate in model.rates))
        for name, model in release_table.MODELS.items()
    }


@pytest.mark.parametrize("label", ["PVT-Small", "CvT-13"])
def test_counts_of_models_of_transformers(label: str) -> None:
    pytest.importorskip("transformers")
    entry = entries.Entry(label, release_table.MODELS[label].source, "tiny")
    with torch.device("meta"):
        built = entries.build(entry, 224)
    params = sum(parameter.numel() for parameter in built.parameters())
    assert params / 1e6 == pytest.approx(release_table.MODELS[label].params_m, rel=0.005)
    macs = entries.multiply_adds(entry, 224)
    assert macs / 1e9 == pytest.approx(release_table.MODELS[label].macs_g, rel=0.05)


def test_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of two models, one of which refuses the resolution."""
    monkeypatch.setattr(common, "in_process", lambda _, function, *of: (function(*of), ""))
    monkeypatch.setattr(release_table, "run_in_process", lambda _, __, *job: models.run_group(*job))
    words = ["--models", "ViL-Small", "Swin-Tiny", "--sizes", "40", "--batch-size", "1", "--rounds", "2"]
    assert release_table.main([*words, "--device", "cpu", "--out", str(tmp_path)]) == 0
    paths = {path.suffix: path for path in tmp_path.iterdir()}
    assert set(paths) == {".md", ".csv", ".png"}
    refused, swin = csv_rows(tmp_path)
    assert (refused["model"], swin["model"]) == ("ViL-Small", "Swin-Tiny")
    assert "multiple of 32" in refused["note"] and not refused["img/s"]
    assert swin["note"] == "" and float(swin["img/s"]) > 0
    assert (swin["rounds"], float(swin["vs swin"])) == ("2", 1)
    lines = [line for line in paths[".md"].read_text().splitlines() if line.startswith(("| ViL", "| Swin"))]
    assert len(lines) == 2 and "multiple of 32" in lines[0] and "multiple of 32" not in lines[1]


def test_a_process_that_dies_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "in_process", lambda *_: (None, common.DIED))
    args = release_table.parse(["--models", "Swin-Tiny", "--rounds", "1"])
    args.device = CPU
    (row,) = release_table.run_group(args, "tiny", 224)
    assert row.note == common.DIED and not row.seconds
