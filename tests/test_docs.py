"""What the documentation says is tried: commands, options, links, the model table, and quoted messages.

In README.md and the get_started.md files, blocks marked bash and python run here, on a nano model and few
images; blocks marked sh, which need GPUs, ImageNet or several processes, are parsed; yaml blocks are loaded.
A kind of command that is not known here is an error, so that none escapes.
"""

import ast
import importlib
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
from conftest import REPO
from openmmlab_runs import ONE_PROCESS, in_scope
from torch.distributed.run import get_args_parser

import main
from config import flatten, load_config

GUIDE = REPO / "classification" / "get_started.md"
DOCS = [REPO / "README.md", *sorted(REPO.glob("*/get_started.md"))]
PAGES = [*DOCS, REPO / "figures" / "README.md"]
PAGES += [
    REPO / name for name in ("MODEL_ZOO.md", "CONTRIBUTING.md", "CHANGELOG.md", "tools/results/README.md")
]
FEW_SCENES = ONE_PROCESS | {  # over a config of detection/ or segmentation/: an epoch takes a second
    "train_cfg.val_interval": 1000,  # after the last epoch alone
    "train_dataloader.dataset.indices": 2,
    "val_dataloader.dataset.indices": 1,
    "test_dataloader.dataset.indices": 1,
}
OUR_COMMANDS = ("main", "classification.", "data.", "detection.", "segmentation.", "tools.")
SCOPES = {"detection": "mmdet", "segmentation": "mmseg"}
SHELL_WORDS = {"source", "head", "export", "cd", "pip", "["}  # not ours to check
QUICK = {  # more options of a command that trains, so that it takes a second
    "DATA.BATCH_SIZE": 16,
    "DATA.NUM_WORKERS": 0,
    "MODEL.FOCAL.DEPTHS": [1, 1],
    "MODEL.FOCAL.EMBED_DIM": 12,
    "MODEL.FOCAL.NUM_HEADS": [1, 2],
    "TRAIN.EPOCHS": 1,
    "TRAIN.WARMUP_EPOCHS": 0,
}
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
OPTION_KEY = re.compile(r"(?:[A-Z][A-Z0-9_]*\.)+[A-Z0-9_]+(?![A-Za-z])")


@dataclass
class Block:
    """A fenced block of a document."""

    doc: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.doc.relative_to(REPO)}:{self.line}"

    def commands(self) -> Iterator[list[str]]:
        """The commands of a shell block as lists of words, without comments and variable assignments."""
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and (words[0] == "srun" or re.match(r"[A-Za-z_]+=", words[0])):
                words = words[1:] if words[0] == "srun" or "$(" not in words[0] else []
            if words[:2] == ["sh", "-c"]:  # with the environment of a task, which Slurm starts
                words = [word for word in shlex.split(words[2]) if word != "exec"]
                words = words[next(i for i, word in enumerate(words) if "=" not in word) :]
            if words:
                yield words


def blocks(doc: Path, kind: str) -> Iterator[Block]:
    text = doc.read_text()
    for match in re.finditer(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(doc, text.count("\n", 0, match.start()) + 1, match[1])


def prose(doc: Path) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", doc.read_text(), flags=re.MULTILINE | re.DOTALL)


def inline_code(doc: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(doc))


def named(doc: Path) -> str:
    return str(doc.relative_to(REPO))


def command_of(words: list[str]) -> tuple[str, list[str]]:
    """The module that a command runs, by python or torchrun, and its arguments; ("", []) for others."""
    if words[:2] == ["python", "-m"]:
        return words[2], words[3:]
    if words[0] == "torchrun":
        launch = get_args_parser().parse_args(words[1:])
        words = ["python", launch.training_script, *launch.training_script_args]
    if words[0] != "python":
        return "", []
    return words[1].removesuffix(".py").replace("/", "."), words[2:]


def load(name: str) -> ModuleType:
    """A module of this repository; of a package what `python -m` runs."""
    module = importlib.import_module(name)
    return importlib.import_module(f"{name}.__main__") if hasattr(module, "__path__") else module


def check_config(path: str) -> None:
    """A config's model is built, and has heads for the classes of its data sets."""
    from mmengine.registry import MODELS, DefaultScope

    from openmmlab import check_data, runner

    config = runner.read_config(path)
    with DefaultScope.overwrite_default_scope(config.default_scope), torch.device("meta"):
        model = MODELS.build(config.model)
    with patch.object(check_data, "_check_files"):  # of a data set that is not here
        loaders = [config.get(f"{split}_dataloader") or {} for split in ("train", "val", "test")]
        sets = [data for loader in loaders for _, data in check_data._data_sets(loader, path, config)]
    (classes,) = {tuple(data.metainfo["classes"]) for data in sets}
    check_data.check_model(model, classes)


def is_of_a_task(name: str) -> bool:
    """Whether a command trains or tests a detector or segmenter."""
    task, _, command = name.partition(".")
    return task in SCOPES and command in ("train", "test")


def with_more(words: list[str], flag: str, values: list[str]) -> list[str]:
    """A command with more values of a flag, which is added if it is not there."""
    words = words if flag in words else [*words, flag]
    start = words.index(flag) + 1
    return [*words[:start], *values, *words[start:]]


def quicken(arguments: list[str], few: Path) -> list[str]:
    """A command of main.py with a nano model and few images."""
    words = list(arguments)
    if "--zip" in words:
        words += ["--batch-size", "64"]
    elif "--data-path" in words:
        words[words.index("--data-path") + 1] = str(few)
    return with_more(words, "--opts", [str(word) for pair in QUICK.items() for word in pair])


# --- Commands -----------------------------------------------------------------------------------------------


def need_target(targets: list[str], where: str) -> None:
    """What make knows how to make."""
    dry = subprocess.run(["make", "-n", *targets], cwd=REPO, capture_output=True, text=True, check=False)
    assert dry.returncode == 0, f"{where}: {dry.stderr}"


def run_ours(name: str, arguments: list[str], few: Path) -> int | None:
    """Run one of our commands within this process, with few images where it trains."""
    if is_of_a_task(name):
        from openmmlab import runner

        task, command = name.split(".")
        words = with_more(arguments, "--cfg-options", [f"{key}={value}" for key, value in FEW_SCENES.items()])
        with in_scope(SCOPES[task]):
            return getattr(runner, command)(words)
    return load(name).main(quicken(arguments, few) if name == "main" else arguments)


def parse_ours(name: str, arguments: list[str]) -> None:
    """Parse one of our commands; its config loads, and has what the command sets."""
    if is_of_a_task(name):
        from openmmlab import runner
        from openmmlab.check_config import check_overrides

        args = getattr(runner, f"parse_{name.split('.')[1]}")(arguments)
        check_overrides(runner.read_config(args.config), args.cfg_options or {})
    elif name == "main":
        main.read_config(arguments)
    else:
        load(name).parse(arguments)


@pytest.mark.parametrize("doc", DOCS, ids=named)
def test_bash_blocks_run_in_order(
    doc: Path, few_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One folder per document, where the repository's files are links and everything new is a file."""
    for entry in REPO.iterdir():
        if entry.name not in ("output", "demo", ".venv", ".git"):
            (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PT_OUTPUT_DIR", raising=False)
    ran = 0
    for block in blocks(doc, "bash"):
        for words in block.commands():
            name, arguments = command_of(words)
            if words[0] == "make":
                need_target(words[1:], str(block))
            elif name == "-c":
                exec(arguments[0], {})
            else:
                assert name.startswith(OUR_COMMANDS), f"{block}: unknown {shlex.join(words)}"
                assert not run_ours(name, arguments, few_images), f"{block}: {shlex.join(words)}"
            ran += 1
    assert ran
    for written in tmp_path.glob("output/*/*/config.yaml"):  # can itself be given to --cfg, says the text
        load_config(written)
    words = set(re.findall(r"\w+", " ".join(inline_code(GUIDE))))
    for written in tmp_path.glob("output/*/*/metrics.jsonl"):
        for line in written.read_text().splitlines():
            assert set(json.loads(line)) <= words, "metrics that the guide does not explain"


@pytest.mark.parametrize("doc", PAGES, ids=named)
def test_sh_blocks_parse(doc: Path) -> None:
    for block in blocks(doc, "sh"):
        for words in block.commands():
            name, arguments = command_of(words)
            if name.startswith(OUR_COMMANDS):
                parse_ours(name, arguments)
            elif words[0] == "make":
                need_target(words[1:], str(block))
            else:
                assert words[0] in SHELL_WORDS, f"{block}: unknown command {shlex.join(words)}"


@pytest.mark.parametrize("doc", DOCS, ids=named)
def test_python_blocks_run(doc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that show a config of detection or segmentation hold it as text, which loads."""
    for configs in REPO.glob("*/configs"):
        shutil.copytree(configs, tmp_path / configs.relative_to(REPO))
    monkeypatch.chdir(REPO)
    for block in blocks(doc, "python"):
        names: dict[str, object] = {}
        exec(compile(block.text, str(block), "exec"), names)
        if isinstance(names.get("config"), str):
            own = tmp_path / doc.parent.name / "configs" / "own.py"
            own.write_text(str(names["config"]))
            check_config(str(own))


@pytest.mark.parametrize("doc", DOCS, ids=named)
def test_yaml_blocks_load(doc: Path, tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(REPO / "configs")
    for block in blocks(doc, "yaml"):
        (tmp_path / "own.yaml").write_text(block.text)
        load_config(tmp_path / "own.yaml")


# --- Names --------------------------------------------------------------------------------------------------


def known_flags() -> set[str]:
    ours = {f"--{flag}" for flag in ["cfg", "opts", "help", "local_rank", *main.FLAGS, *main.SWITCHES]}
    torchrun = {flag for action in get_args_parser()._actions for flag in action.option_strings}
    folders = ("openmmlab", "classification", "data", "detection", "segmentation", "tools")
    sources = [path for folder in folders for path in REPO.glob(f"{folder}/**/*.py")]
    tasks = {flag for path in sources for flag in re.findall(r'"(--[\w-]+)"', path.read_text())}
    return ours | torchrun | tasks | {"--shm-size", "--no-amp"}


@pytest.mark.parametrize("doc", PAGES, ids=named)
def test_flags_and_options_in_the_text_exist(doc: Path) -> None:
    options, flags = set(flatten(load_config())), known_flags()
    for code in inline_code(doc):
        for flag in re.findall(r"(?<![\w-])--[\w-]+", code):
            assert flag in flags, f"{doc.name}: no flag {flag}"
        for key in OPTION_KEY.findall(code):
            assert key in options, f"{doc.name}: no option {key}"


def test_every_flag_is_documented() -> None:
    guide = prose(GUIDE)
    for flag, (key, _) in (main.FLAGS | main.SWITCHES).items():
        assert re.search(rf"^\| `--{flag}[ `].*\| `{re.escape(key)}` \|", guide, re.MULTILINE)


def test_quoted_messages_are_in_the_code() -> None:
    """The left column of the table under Troubleshooting."""
    patterns = ("*.py", "models/**/*.py", "data/*.py", "training/*.py", "tools/**/*.py")
    trees = [ast.parse(path.read_text()) for pattern in patterns for path in REPO.glob(pattern)]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    texts = [node.value for node in nodes if isinstance(node.value, str)]
    section = prose(GUIDE).split("## Troubleshooting")[1]
    messages = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    assert len(messages) > 20
    assert [message for message in messages if not any(message in text for text in texts)] == []


@pytest.mark.parametrize("doc", PAGES, ids=named)
def test_links_lead_somewhere(doc: Path) -> None:
    for target in LINK.findall(doc.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (doc.parent / path).resolve() if path else doc
        assert linked.exists(), f"{doc.name}: {target}"
        assert linked.is_relative_to(REPO)
        if anchor:
            titles = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{doc.name}: {target}"


# --- Numbers ------------------------------------------------------------------------------------------------


def test_model_table() -> None:
    """One row per config, with the numbers of MODEL_ZOO.md, which are counted and quoted."""
    cells = (
        r"\(configs/(\w+)\.yaml\) \| ([\d.]+)[ ()\d.]* \| ([\d.]+)[ ()\d.]* \| *([\d.]*) *\| *([\d.]*) *\|"
    )
    ours, theirs = (re.findall(cells, (REPO / name).read_text()) for name in ("README.md", "MODEL_ZOO.md"))
    assert ours == theirs
    assert {name for name, *_ in ours} == {path.stem for path in REPO.glob("configs/focal*.yaml")}
