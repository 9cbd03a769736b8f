"""tools/visualize.py, tools/figures: weights reproduce what layers answer, maps show the right tokens."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NANO_WORDS, REPO
from PIL import Image

from config import load_config
from models import FocalTransformer, build_model
from models.focal_transformer import CoarseTokens
from tools import visualize
from tools.figures import __main__ as make_figures
from tools.figures import attention
from tools.figures.drawing import save

VARIANTS = {
    "plain": ["DATA.IMG_SIZE", 112],
    "three levels": ["DATA.IMG_SIZE", 112, "MODEL.FOCAL.FOCAL_LEVELS", [3, 3, 3, 3]],
    "shift and padding": [
        *("DATA.IMG_SIZE", [72, 100], "MODEL.FOCAL.USE_SHIFT", True, "MODEL.FOCAL.DEPTHS", [2, 2, 2, 2]),
    ],
    "Focal-fast": ["DATA.IMG_SIZE", [72, 100], "MODEL.TYPE", "focalv2"],
}


Seen = list[tuple[attention.TokenMap, torch.Tensor, torch.Tensor]]


def make(name: str) -> tuple[FocalTransformer, torch.Tensor]:
    """A model whose attention is far from even, and an image."""
    config = load_config(None, [*NANO_WORDS, *VARIANTS[name]])
    torch.manual_seed(0)
    model = build_model(config).eval()
    for key, parameter in model.named_parameters():
        if "bias_table" in key or "qkv.weight" in key or "coord2rpb" in key:
            torch.nn.init.normal_(parameter, std=0.2)
    size = config.DATA.IMG_SIZE
    height, width = (size, size) if isinstance(size, int) else size
    return model, torch.randn(1, 3, height, width)


@pytest.fixture(scope="module", params=list(VARIANTS))
def seen(request: pytest.FixtureRequest) -> Seen:
    """Of all blocks: the map, queries, keys and values, and what went to the projection, [1, H, W, C]."""
    model, image = make(request.param)
    maps = [tokens for stage in attention.token_maps(model, *image.shape[2:]) for tokens in stage]
    given: list[torch.Tensor] = []
    for tokens in maps:
        tokens.layer.proj.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    return [*zip(maps, attention.record(model, image, maps), given, strict=True)]


def test_weights_reproduce_the_output(seen: Seen) -> None:
    """Of the fast operator, in every block: weights @ values is what it returned."""
    for tokens, qkv, output in seen:
        for row, column in product((0, tokens.height // 2, tokens.height - 1), (0, tokens.width - 1)):
            weights = attention.weights_of_query(tokens, qkv, row, column)
            torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(weights)))
            again = torch.einsum("ns,snd->nd", weights, qkv[0, :, 2]).flatten()
            torch.testing.assert_close(again, output[0, row, column], atol=1e-5, rtol=1e-5)


def test_weights_lie_on_what_is_seen(seen: Seen) -> None:
    """All of a query's weight falls on its grains, but for padding, which has no place on the map."""
    for tokens, qkv, _ in seen:
        for place in ((0, 0), (tokens.height - 1, tokens.width // 2)):
            grains = tokens.seen_from(*place)
            cells = torch.cat([grain.tokens for grain in grains])
            assert len(cells) == len(cells.unique()), "a token in two grains"
            weights = attention.weights_of_query(tokens, qkv, *place)
            shares = weights[:, cells].sum(dim=1)
            assert (shares < 1.0001).all()
            if tokens.padded == (tokens.height, tokens.width):
                torch.testing.assert_close(shares, torch.ones_like(shares))
                torch.testing.assert_close(tokens.evenly(weights.mean(dim=0)).sum(), torch.tensor(1.0))
            assert grains[0].name == attention.OWN_WINDOW and grains[0].cells[place] >= 0


@pytest.mark.parametrize("name", ["three levels", "Focal-fast"])
def test_pooled_tokens_stand_where_they_were_pooled(name: str) -> None:
    """The places of a pooled token are those on which it depends."""
    _, image = make(name)
    for tokens in attention.stage_maps(make(name)[0], *image.shape[2:]):
        layer, rows = tokens.layer, tokens.padded[0] * tokens.padded[1]
        fine = torch.zeros(1, *tokens.padded, 1, requires_grad=True)
        layer.pool = "mean" if layer.pooled_levels else "none"
        pools = CoarseTokens(layer, 1)
        pooled = [pools.pooled(fine, level) for level in range(layer.pooled_levels)]
        pooled = torch.cat(pooled, dim=1)[0, :, 0] if pooled else torch.empty(0)
        for grain in tokens.grains()[1:]:
            for number in grain.tokens[[0, -1]].tolist():
                (gradient,) = torch.autograd.grad(pooled[number - rows], fine, retain_graph=True)
                depends = gradient[0, : tokens.height, : tokens.width, 0] != 0
                assert torch.equal(depends, grain.cells == number)


def test_key_sets_of_the_paper() -> None:
    """Focal-T at 224, in the middle: 49 own, 120 around, and pooled windows (7 x 7, 5 x 5, 3 x 3, 1)."""
    config = load_config(REPO / "configs/focal_tiny_patch4_window7_224.yaml")
    maps = attention.stage_maps(build_model(config), 224, 224)
    counts = []
    for tokens in maps:
        grains = tokens.seen_from(tokens.height // 2, tokens.width // 2)
        counts.append([len(grain.tokens) for grain in grains])
        assert grains[-1].name == "pooled 7 x 7"
    assert counts == [[49, 120, 49], [49, 120, 16], [49, 120, 4], [49, 1]]
    around = maps[0].seen_from(28, 28)[1].cells >= 0
    rows, columns = around.nonzero().T
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (25, 37, 25, 37)
    wrapped = maps[0].seen_from(0, 0)[1].cells >= 0
    assert wrapped[55, 55] and wrapped[0, 55]  # the ring wraps round the image


# --- Pictures; test_docs.py draws both kinds of a trained model ---------------------------------------------

DEMO = ("--cfg", str(REPO / "configs/demo.yaml"))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.RandomState(0).randint(0, 255, (50, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    return tmp_path / "noise.png"


def test_keys_need_no_weights(image: Path, tmp_path: Path) -> None:
    assert visualize.main([str(image), *DEMO, "--kinds", "keys", "--out", str(tmp_path)]) == 0
    Image.open(tmp_path / "keys.png").verify()


def test_an_image_is_not_replaced_by_its_picture(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = image.rename(tmp_path / "keys.png")
    content = image.read_bytes()
    assert visualize.main([str(image), *DEMO, "--kinds", "keys", "--out", str(tmp_path)]) == 2
    assert "keys.png would be replaced" in capsys.readouterr().err and image.read_bytes() == content


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kinds", "attention"], "--resume: expected a checkpoint"),
        (["--kinds", "keys", "--at", "64", "0"], "--at: expected a pixel"),
    ],
)
def test_mistakes_are_one_sentence(
    words: list[str], message: str, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert visualize.main([str(image), *DEMO, *words, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_teaser_is_drawn_again(tmp_path: Path) -> None:
    save(make_figures.draw_teaser(), tmp_path / "teaser.png")
    drawn, there = (
        Image.open(folder / "teaser.png").convert("RGB") for folder in (tmp_path, REPO / "figures")
    )
    assert drawn.size == there.size
    assert len(set(drawn.resize((50, 50)).getdata())) > 20  # not blank
