"""Every option of the project: default, meaning, allowed values.

`load_config` starts from the defaults below, merges a yaml file and then a list of `KEY VALUE` pairs, and
returns a frozen `yacs.config.CfgNode`. A yaml file may inherit from others: `BASE: [FILE, ...]`, relative
to itself. In all paths, `~` and $VARIABLES are replaced.

Names, types, choices and ranges of single values are checked here. Conflicts between options are checked
where the options are used: training/run.py (mode, weights, epochs), utils.py (device, precision),
`models.build_model`, `data.build_loaders` and optimizer.py.

All keys of the original release are here with their original defaults, so its yaml files load unchanged;
those in NO_EFFECT are accepted and dropped.
"""

import ast
import contextlib
import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import yaml
from yacs.config import CfgNode as CN

from utils import expand_path

_C = CN()
_C.DATA = CN()
_C.DATA.BATCH_SIZE = 128  # images per process and step; --batch-size
_C.DATA.DATA_PATH = ""  # root folder of the data set; --data-path
_C.DATA.DATASET = "imagenet"  # imagenet | imagenet22k | imagewoof | folder | wds | hf; --dataset
_C.DATA.IMG_SIZE = 224  # one number, or [height, width]
_C.DATA.INTERPOLATION = "bicubic"  # random | bilinear | bicubic; 'random' concerns training only
_C.DATA.ZIP_MODE = False  # read from zip files with map files instead of folders; --zip
_C.DATA.PIN_MEMORY = True  # page-locked host memory for faster copies to the GPU
_C.DATA.NUM_WORKERS = 8  # loader processes per training process; no more than there are cores
_C.DATA.DECODER = "pil"  # pil | opencv (faster); concerns training only, evaluation always decodes with pil
_C.DATA.EXIF_ORIENTATION = False  # turn photographs upright as their EXIF data say; the original does not
_C.DATA.MEAN = [0.485, 0.456, 0.406]  # per channel, of images in [0, 1]
_C.DATA.STD = [0.229, 0.224, 0.225]

_C.DATA.HF = CN()  # with DATASET hf; '' finds what fits
_C.DATA.HF.IMAGE_COLUMN = ""
_C.DATA.HF.LABEL_COLUMN = ""
_C.DATA.HF.TRAIN_SPLIT = ""
_C.DATA.HF.VAL_SPLIT = ""

_C.MODEL = CN()
_C.MODEL.TYPE = "focal"  # focal | focalv2 (Focal-fast)
_C.MODEL.NAME = "focal_tiny_patch4_window7_224"  # names the output folder
_C.MODEL.RESUME = ""  # training checkpoint to continue from; with EVAL_MODE, any checkpoint; --resume
_C.MODEL.PRETRAINED = ""  # weights (file or address) to start from; --pretrained
_C.MODEL.RESET_HEAD = False  # with PRETRAINED: start with a new classifier, for another set of classes
_C.MODEL.NUM_CLASSES = 1000  # 10 with imagewoof, unless given
_C.MODEL.DROP_RATE = 0.0  # dropout
_C.MODEL.DROP_PATH_RATE = 0.1  # stochastic depth of the last block; rises linearly from 0
_C.MODEL.LABEL_SMOOTHING = 0.1
_C.MODEL.ATTENTION_BACKEND = "auto"  # auto | plain | cpu | triton

_C.MODEL.FOCAL = CN()
_C.MODEL.FOCAL.PATCH_SIZE = 4  # stride of the stem, pixels
_C.MODEL.FOCAL.IN_CHANS = 3
_C.MODEL.FOCAL.EMBED_DIM = 96  # channels of the first stage; doubles with every stage
_C.MODEL.FOCAL.DEPTHS = [2, 2, 6, 2]  # blocks per stage
_C.MODEL.FOCAL.NUM_HEADS = [3, 6, 12, 24]
_C.MODEL.FOCAL.WINDOW_SIZE = 7  # tokens on a side
_C.MODEL.FOCAL.MLP_RATIO = 4.0  # hidden channels of the MLP over those of the block
_C.MODEL.FOCAL.QKV_BIAS = True
_C.MODEL.FOCAL.QK_SCALE = False  # False or None: head_dim ** -0.5; else a number
_C.MODEL.FOCAL.APE = False  # learned absolute position embedding
_C.MODEL.FOCAL.PATCH_NORM = True  # LayerNorm after the stem
_C.MODEL.FOCAL.USE_SHIFT = False  # shift the windows of odd blocks
_C.MODEL.FOCAL.FOCAL_POOL = "none"  # none | fc | conv | mean | max: how sub-windows become coarse tokens
_C.MODEL.FOCAL.FOCAL_STAGES = [0, 1, 2, 3]  # stages that have coarse tokens
_C.MODEL.FOCAL.FOCAL_LEVELS = [1, 1, 1, 1]  # per stage: 0 own window, 1 adds the ring, 2 and up coarse tokens
_C.MODEL.FOCAL.FOCAL_WINDOWS = [7, 5, 3, 1]  # side of the coarse neighbourhood per stage, in windows; odd
_C.MODEL.FOCAL.FOCAL_TOPK = 128  # focalv2: keys per window and level
_C.MODEL.FOCAL.EXPAND_SIZES = [3, 3, 3, 3]  # focal: width of the fine ring around the window, per stage
_C.MODEL.FOCAL.EXPAND_LAYER = "all"  # all | even | odd; 'even' and 'odd' name the blocks without ring
_C.MODEL.FOCAL.USE_CONV_EMBED = False  # overlapping convolutions as stem and downsamplers
_C.MODEL.FOCAL.USE_LAYERSCALE = False
_C.MODEL.FOCAL.LAYERSCALE_VALUE = 1e-4  # initial value with USE_LAYERSCALE
_C.MODEL.FOCAL.USE_PRE_NORM = False  # normalise before each downsampler too

_C.TRAIN = CN()
_C.TRAIN.START_EPOCH = 0  # first epoch of a run that resumes nothing
_C.TRAIN.EPOCHS = 300
_C.TRAIN.WARMUP_EPOCHS = 20
_C.TRAIN.WEIGHT_DECAY = 0.05
_C.TRAIN.BASE_LR = 5e-4  # this and the next two: for 512 images per update; scaled linearly
_C.TRAIN.WARMUP_LR = 5e-7
_C.TRAIN.MIN_LR = 5e-6  # at the end; not of the step schedule
_C.TRAIN.CLIP_GRAD = 5.0  # largest gradient norm; 0 measures it without clipping
_C.TRAIN.AUTO_RESUME = True  # from the newest checkpoint of the output folder; False: refuse such a folder
_C.TRAIN.ACCUMULATION_STEPS = 0  # batches per optimizer update; 0 and 1 mean one; --accumulation-steps
_C.TRAIN.USE_CHECKPOINT = False  # recompute activations in the backward pass to save memory; --use-checkpoint

_C.TRAIN.LAYER_DECAY = 1.0  # each layer learns at this fraction of the next layer's rate; 1 for one rate
_C.TRAIN.FREEZE_STAGES = -1  # -1 freezes nothing, 0 the stem, n the first n stages as well; never the head

# Updates whose gradient is not finite are skipped. This many in a row end the run; counted at log lines only.
_C.TRAIN.BAD_STEPS_MAX = 10

_C.TRAIN.EMA = CN()
_C.TRAIN.EMA.ENABLED = False  # keep a moving average of the weights; evaluated and saved beside them
_C.TRAIN.EMA.DECAY = 0.9999  # per update
_C.TRAIN.EMA.WARMUP = False  # begin with a smaller decay: 1 - n ** (-2 / 3) at update n, up to DECAY

_C.TRAIN.LR_SCHEDULER = CN()
_C.TRAIN.LR_SCHEDULER.NAME = "cosine"  # cosine | linear | step
_C.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = 30  # step
_C.TRAIN.LR_SCHEDULER.DECAY_RATE = 0.1  # step

_C.TRAIN.OPTIMIZER = CN()
_C.TRAIN.OPTIMIZER.NAME = "adamw"  # adamw | sgd
_C.TRAIN.OPTIMIZER.EPS = 1e-8
_C.TRAIN.OPTIMIZER.BETAS = (0.9, 0.999)
_C.TRAIN.OPTIMIZER.MOMENTUM = 0.9  # sgd

_C.AUG = CN()
_C.AUG.HFLIP = 0.5  # probability of a horizontal flip
_C.AUG.SCALE = (0.08, 1.0)  # area of the random crop, as a share of the image
_C.AUG.RATIO = (0.75, 1.3333)  # its aspect ratio
_C.AUG.COLOR_JITTER = 0.4  # acts only with AUTO_AUGMENT none or 3a
_C.AUG.AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"  # a policy in timm's notation, or none
_C.AUG.REPROB = 0.25  # probability of random erasing
_C.AUG.REMODE = "pixel"  # const | rand | pixel
_C.AUG.RECOUNT = 1  # erased boxes
_C.AUG.MIXUP = 0.8  # alpha; 0 switches it off
_C.AUG.CUTMIX = 1.0  # alpha; 0 switches it off
_C.AUG.CUTMIX_MINMAX = None  # None or [smallest, largest] share of the side; overrides CUTMIX
_C.AUG.MIXUP_PROB = 1.0  # probability of mixing a batch at all
_C.AUG.MIXUP_SWITCH_PROB = 0.5  # probability of CutMix when both are on
_C.AUG.MIXUP_MODE = "batch"  # batch | pair | elem

_C.TEST = CN()
_C.TEST.CROP = True  # resize larger and crop the centre, instead of resizing to IMG_SIZE

_C.LOG = CN()
_C.LOG.WANDB = ""  # log to this project of Weights & Biases as well; '' does not

_C.AMP_OPT_LEVEL = ""  # '' (O1 on CUDA, XPU or with AMP_DTYPE, else O0) | O0 full precision | O1, O2 autocast
_C.AMP_DTYPE = ""  # '' (bf16 where the device has it, else fp16) | bf16 | fp16; --amp-dtype
_C.COMPILE = False  # torch.compile the model; --compile
_C.DEVICE = ""  # '' (the accelerator, else cpu) | cpu | cuda | cuda:N | mps | xpu | ...; --device
_C.OUTPUT = ""  # root of the output folders, '' is output; the run's is <OUTPUT>/<MODEL.NAME>/<TAG>
_C.TAG = "default"  # --tag
# Saving. A file that cannot be written (full disk, read-only folder) is an error in the log; older ones stay,
# and training continues; the last save of a run must succeed. Exit status: 0 done, 2 for what the user can
# correct, 75 saved and stopped by SIGTERM or SIGUSR1 (the same command continues), 1 if another process died
# or hangs, 130 after Ctrl-C with several processes.
_C.SAVE_FREQ = 1  # epochs between checkpoints; the last epoch is always saved
_C.SAVE_STEPS = 0  # also save every so many steps, after the next update; 0 for never
_C.SAVE_KEEP = 0  # newest checkpoints to keep besides best.pth; 0 keeps those of all whole epochs
_C.SAVE_FAILURES_MAX = 3  # failed saves in a row, of checkpoints or of best.pth, that end the run
_C.DIST_TIMEOUT_MINUTES = 30.0  # how long a process waits for one that hangs, before it ends the job
_C.DETERMINISTIC = False  # use deterministic algorithms only, or raise an error; slower on a GPU
_C.PRINT_FREQ = 100  # steps between log lines
_C.SEED = 0  # --seed
_C.EVAL_MODE = False  # --eval
_C.THROUGHPUT_MODE = False  # --throughput
_C.DEBUG_MODE = False  # --debug

NO_EFFECT = ("MODEL.FOCAL.EXPAND_STAGES", "MODEL.SPEC", "LOCAL_RANK", "DATA.CACHE_MODE")


# --- Types, choices and ranges ------------------------------------------------------------------------------


# The type of an option is that of its default; a tuple has two entries, a list any number of them.
TYPES: dict[type, tuple[str, tuple[type, ...]]] = {  # what to call it, and which types it accepts
    bool: ("True or False", (bool,)),
    int: ("an integer", (int,)),
    float: ("a number", (float, int)),
    str: ("text", (str,)),
    NoneType: ("None", (NoneType,)),
}
OTHER_TYPES: dict[str, tuple[Any, ...]] = {  # that an option may have as well, by an example
    "DATA.IMG_SIZE": ((224, 224),),
    "MODEL.FOCAL.QK_SCALE": (None, 0.1),
    "AUG.CUTMIX_MINMAX": ((0.2, 0.8),),
}
PATHS = ("DATA.DATA_PATH", "MODEL.RESUME", "MODEL.PRETRAINED", "OUTPUT")
NAMES = ("TRAIN.OPTIMIZER.NAME", "TRAIN.LR_SCHEDULER.NAME")  # of any case

CHOICES: dict[str, tuple[str, ...]] = {
    "DATA.DATASET": ("imagenet", "imagenet22k", "imagewoof", "folder", "wds", "hf"),
    "DATA.INTERPOLATION": ("random", "bilinear", "bicubic"),
    "DATA.DECODER": ("pil", "opencv"),
    "TRAIN.LR_SCHEDULER.NAME": ("cosine", "linear", "step"),
    "TRAIN.OPTIMIZER.NAME": ("adamw", "sgd"),
    "AUG.REMODE": ("const", "rand", "pixel"),
    "AUG.MIXUP_MODE": ("batch", "pair", "elem"),
    "AMP_OPT_LEVEL": ("", "O0", "O1", "O2"),
    "AMP_DTYPE": ("", "bf16", "fp16"),
}

AT_LEAST_1 = ["DATA.BATCH_SIZE", "MODEL.NUM_CLASSES", "TRAIN.EPOCHS", "TRAIN.BAD_STEPS_MAX", "AUG.RECOUNT"]
AT_LEAST_1 += ["TRAIN.LR_SCHEDULER.DECAY_EPOCHS", "SAVE_FREQ", "SAVE_FAILURES_MAX", "PRINT_FREQ"]
AT_LEAST_0 = ["DATA.NUM_WORKERS", "TRAIN.START_EPOCH", "TRAIN.WARMUP_EPOCHS", "TRAIN.WEIGHT_DECAY"]
AT_LEAST_0 += ["TRAIN.CLIP_GRAD", "TRAIN.ACCUMULATION_STEPS"]
AT_LEAST_0 += ["AUG.COLOR_JITTER", "AUG.MIXUP", "AUG.CUTMIX", "SEED", "SAVE_STEPS", "SAVE_KEEP"]
POSITIVE = ["DATA.STD", "TRAIN.OPTIMIZER.EPS", "AUG.RATIO"]
FROM_0_TO_1 = ["AUG.HFLIP", "AUG.REPROB", "AUG.CUTMIX_MINMAX", "AUG.MIXUP_PROB", "AUG.MIXUP_SWITCH_PROB"]
FROM_0_TO_1 += ["DATA.MEAN"]
BELOW_1 = ["MODEL.LABEL_SMOOTHING", "TRAIN.EMA.DECAY", "TRAIN.OPTIMIZER.BETAS", "TRAIN.OPTIMIZER.MOMENTUM"]
SHARES = ["TRAIN.LAYER_DECAY", "TRAIN.LR_SCHEDULER.DECAY_RATE", "AUG.SCALE"]

# A rule: what is expected, and whether a value is valid. Lists are checked entry by entry.
RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **{key: ("one of " + ", ".join(map(repr, names)), names.__contains__) for key, names in CHOICES.items()},
    **dict.fromkeys(AT_LEAST_1, ("1 or more", lambda value: value >= 1)),
    **dict.fromkeys(AT_LEAST_0, ("0 or more", lambda value: value >= 0)),
    **dict.fromkeys(POSITIVE, ("greater than 0", lambda value: value > 0)),
    **dict.fromkeys(FROM_0_TO_1, ("in [0, 1]", lambda value: 0 <= value <= 1)),
    **dict.fromkeys(BELOW_1, ("in [0, 1)", lambda value: 0 <= value < 1)),
    **dict.fromkeys(SHARES, ("in (0, 1]", lambda value: 0 < value <= 1)),
    "TRAIN.BASE_LR": ("in (0, 1e6]", lambda value: 0 < value <= 1e6),  # larger ones overflow in float32
    **dict.fromkeys(("TRAIN.WARMUP_LR", "TRAIN.MIN_LR"), ("in [0, 1e6]", lambda value: 0 <= value <= 1e6)),
    "DIST_TIMEOUT_MINUTES": ("in (0, 525600], at most a year", lambda value: 0 < value <= 525_600),
    "MODEL.FOCAL.QK_SCALE": ("False, None or a number", lambda value: value is not True),
    "MODEL.NAME": ("a name for a folder", lambda value: bool(value.strip())),
}


# --- Loading ------------------------------------------------------------------------------------------------

Setting = tuple[str, Any, str]
"""A key, its value, and its origin: a file or the command line."""


def load_config(
    cfg_file: str | Path | None = None, opts: Sequence[Any] = (), flags: dict[str, Any] | None = None
) -> CN:
    """The defaults, overridden by a yaml file, then by `opts`, then by `flags`; checked and frozen.

    Args:
        cfg_file: yaml (or JSON) file; its BASE files are merged before it.
        opts: flat list `KEY VALUE KEY VALUE ...`; values are text as on the command line, or objects.
        flags: value by key.

    Raises:
        ValueError: a file cannot be used; or, for all options that are wrong, where each comes from, what was
            expected and what to do.
    """
    if len(opts) % 2:
        words = " ".join(map(str, opts))
        raise ValueError(
            f"--opts: expected KEY VALUE pairs, got {len(opts)} words: {words}; give every key one value"
        )
    settings = [] if cfg_file is None else _read_file(str(cfg_file))
    given = [*zip(opts[::2], opts[1::2], strict=True), *(flags or {}).items()]
    settings += [(str(key), value, "command line") for key, value in given]
    config, origin, problems = _C.clone(), {}, []
    for key, value, where in settings:
        if key in NO_EFFECT:
            continue
        try:
            _assign(config, key, value)
            origin[key] = where
        except ValueError as error:
            problems.append(f"{where}: {key}: {error}")
    if config.DATA.DATASET == "imagewoof" and "MODEL.NUM_CLASSES" not in origin:
        config.MODEL.NUM_CLASSES = 10
    problems += [f"{origin.get(key, 'default')}: {key}: {message}" for key, message in _broken_rules(config)]
    if problems:
        file = "" if cfg_file is None else f" of {cfg_file}"
        raise ValueError(
            f"{len(problems)} problem(s) in the configuration{file}:\n  - " + "\n  - ".join(problems)
        )
    config.freeze()
    return config


def flatten(node: CN, prefix: str = "") -> dict[str, Any]:
    """Every option of a config as {dotted key: value}."""
    flat: dict[str, Any] = {}
    for name, value in node.items():
        if isinstance(value, CN):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


class _UniqueKeyLoader(yaml.SafeLoader):
    """yaml's safe loader, which silently takes the last of equal keys, with an error for them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for number, (key, _) in enumerate(node.value):
            if key.value in names[:number]:
                raise ValueError(f"line {key.start_mark.line + 1}: key {key.value} is given twice")
        return super().construct_mapping(node, deep)


def _read_file(file: str, parents: tuple[Path, ...] = ()) -> list[Setting]:
    """The settings of a yaml file, after those of its BASE files; ValueError if one cannot be used.

    Args:
        file: as it was named; relative to the last of `parents`, the files that led here.
    """
    named_by = f" (named by BASE in {parents[-1]})" if parents else ""
    path = (parents[-1].parent if parents else Path()) / expand_path(file)
    if path.resolve() in [parent.resolve() for parent in parents]:
        chain = " -> ".join(map(str, (*parents, path)))
        raise ValueError(f"{path}: BASE: expected no cycle, got {chain}; remove one of these")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except OSError as error:
        raise ValueError(
            f"{path}: expected a yaml file{named_by}, got: {error.strerror}; check the path, as seen from "
            f"{Path.cwd()}"
        ) from error
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: expected valid yaml{named_by}, got: {reason}; correct the file") from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected KEY: value lines{named_by}, got {content!r}; correct the file")
    bases = content.pop("BASE", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f"{path}: BASE: expected a list of yaml files, got {bases!r}; correct it")
    settings = [setting for base in filter(None, bases) for setting in _read_file(base, (*parents, path))]
    return settings + [(key, value, str(path)) for key, value in _leaves(content, _C)]


def _leaves(content: dict[Any, Any], defaults: CN, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The content of a yaml file as (dotted key, value)."""
    for name, value in content.items():
        section = defaults.get(name)
        if isinstance(section, CN) and isinstance(value, dict | None):
            yield from _leaves(value or {}, section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _assign(config: CN, key: str, value: Any) -> None:
    """Convert a value to the type of an option, and set it; ValueError, with the reason, if that fails."""
    *sections, name = key.split(".")
    node = config
    for section in sections:
        node = node.get(section) if isinstance(node, CN) else None
    if not isinstance(node, CN) or name not in node:
        close = difflib.get_close_matches(key, flatten(_C), n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else "see config.py for all keys"
        raise ValueError(f"expected a known key, got {key!r}; {hint}")
    default = flatten(_C).get(key, node[name])  # of a section itself
    if isinstance(default, CN):
        raise ValueError(f"expected a section with keys of its own, got {value!r}; name one of its keys")
    given = ("" if value is None else value) if isinstance(default, str) else _decode(value)
    examples = (default, *OTHER_TYPES.get(key, ()))
    for example in examples:
        with contextlib.suppress(TypeError, OverflowError):
            node[name] = _convert(given, example)
            break
    else:
        expected = " or ".join(map(_type_name, examples))
        raise ValueError(
            f"expected {expected}, got {value!r:.100} ({type(given).__name__}); correct the value"
        )
    if key in PATHS:
        node[name] = expand_path(node[name])
    elif key in NAMES:
        node[name] = node[name].lower()


def _convert(value: Any, example: Any) -> Any:
    """A value in the type of an example, entry by entry; TypeError if it has another, or is not finite."""
    if isinstance(example, list | tuple):
        is_other_length = isinstance(example, tuple) and len(value) != len(example)
        if not isinstance(value, list | tuple) or is_other_length:
            raise TypeError
        return type(example)(_convert(entry, example[0]) for entry in value)
    is_infinite = isinstance(value, float) and not math.isfinite(value)
    if type(value) not in TYPES[type(example)][1] or is_infinite:
        raise TypeError
    return value if example is None else type(example)(value)


def _type_name(example: Any) -> str:
    """The type of an example in words, such as `two numbers`."""
    if not isinstance(example, list | tuple):
        return TYPES[type(example)][0]
    plural = TYPES[type(example[0])][0].split()[-1] + "s"
    return f"a list of {plural}" if isinstance(example, list) else f"two {plural}"


def _decode(value: Any) -> Any:
    """The Python value of a text such as '[2, 2]', 'None', 'true', '5e-4'; other values as they are."""
    if not isinstance(value, str):
        return value
    words = {"true": True, "false": False, "null": None, "none": None}
    try:
        return words[value.lower()] if value.lower() in words else ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, TypeError):
        return value


def _broken_rules(config: CN) -> Iterator[tuple[str, str]]:
    """Values that are no choice or out of range, as (key, message)."""
    values = flatten(config)
    for key, (expected, holds) in RULES.items():
        value = values[key]
        entries = value if isinstance(value, list | tuple) else [value]
        if value is not None and not all(map(holds, entries)):
            each = " for every entry" if len(entries) > 1 else ""
            yield key, f"expected {expected}{each}, got {value!r}; correct the value"
