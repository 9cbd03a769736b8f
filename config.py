"""Every option of the project: default, meaning, allowed values.

``load_config`` starts from the defaults below, merges a yaml file (after the files named by its BASE) and
then a list of ``KEY VALUE`` pairs, checks everything and returns a frozen ``yacs.config.CfgNode``. All
problems found are reported together in one ``ValueError``, each with its origin, what was expected and what
to do.

All keys of the original release are here with their original defaults, so its yaml files load unchanged.
Three of them have no effect and are accepted only for that: MODEL.FOCAL.EXPAND_STAGES, MODEL.SPEC and
LOCAL_RANK.
"""

import ast
import difflib
import errno
import math
import os
import re
import reprlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode as CN

DATASETS = ("imagenet", "imagenet22k", "imagewoof", "folder")
MODEL_TYPES = ("focal", "focalv2")
ATTENTION_BACKENDS = ("auto", "plain", "cpu", "triton")
DECODERS = ("pil", "opencv")
OPTIMIZERS = ("adamw", "sgd", "fused_adam", "fused_lamb")
SCHEDULERS = ("cosine", "linear", "step")
COMMAND_LINE = "command line"  # where a value came from
# What a yaml file may ask for: enough for anything but an attack.
MAX_YAML = 2**16  # letters of a file; the longest here has three thousand
MAX_FILES = 64  # that BASE may lead to
MAX_INTEGER = 2**53
MAX_TEXT = 1000  # letters of a value that is read as a list or number
MAX_STAGES = 16
MAX_LEVELS = 16
SHOWN_PROBLEMS = 50
SHOWN_LETTERS = 200  # of a value in a message

_C = CN()
_C.BASE = [""]  # yaml files to inherit from, relative to the file that names them

_C.DATA = CN()
_C.DATA.BATCH_SIZE = 128  # images per process and step; --batch-size
_C.DATA.DATA_PATH = ""  # root folder of the data set; --data-path
_C.DATA.DATASET = "imagenet"  # imagenet | imagenet22k | imagewoof | folder; --dataset
_C.DATA.IMG_SIZE = 224  # one number, or [height, width]
_C.DATA.INTERPOLATION = "bicubic"  # random | bilinear | bicubic; 'random' concerns training only
_C.DATA.ZIP_MODE = False  # read from zip files with map files instead of folders; --zip
_C.DATA.CACHE_MODE = "part"  # with ZIP_MODE: no | part (each process its share) | full; --cache-mode
_C.DATA.PIN_MEMORY = True  # page-locked host memory for faster copies to the GPU
_C.DATA.NUM_WORKERS = 8  # loader processes per training process
_C.DATA.WORKER_START_METHOD = ""  # '' (the platform's default) | fork | spawn | forkserver
_C.DATA.DECODER = "pil"  # pil | opencv (faster); concerns training only, evaluation always decodes with pil
_C.DATA.MEAN = [0.485, 0.456, 0.406]  # per channel, of images in [0, 1]
_C.DATA.STD = [0.229, 0.224, 0.225]

_C.MODEL = CN()
_C.MODEL.TYPE = "focal"  # focal | focalv2 (Focal-fast)
_C.MODEL.NAME = "focal_tiny_patch4_window7_224"  # names the output folder
_C.MODEL.RESUME = ""  # training checkpoint to continue from; with EVAL_MODE, any checkpoint; --resume
_C.MODEL.PRETRAINED = ""  # weights (file or address) to start from; --pretrained
_C.MODEL.RESET_HEAD = False  # with PRETRAINED: start with a new classifier, for another set of classes
_C.MODEL.HEAD_CLASS_MAP = ""  # with PRETRAINED: file that names, for each class, its index there
_C.MODEL.NUM_CLASSES = 1000
_C.MODEL.DROP_RATE = 0.0  # dropout
_C.MODEL.DROP_PATH_RATE = 0.1  # stochastic depth of the last block; rises linearly from 0
_C.MODEL.LABEL_SMOOTHING = 0.1
_C.MODEL.ATTENTION_BACKEND = "auto"  # auto | plain | cpu | triton
_C.MODEL.SPEC = CN(new_allowed=True)  # no effect; holds anything

_C.MODEL.FOCAL = CN()
_C.MODEL.FOCAL.PATCH_SIZE = 4
_C.MODEL.FOCAL.IN_CHANS = 3
_C.MODEL.FOCAL.EMBED_DIM = 96  # channels of the first stage; doubles with every stage
_C.MODEL.FOCAL.DEPTHS = [2, 2, 6, 2]  # blocks per stage
_C.MODEL.FOCAL.NUM_HEADS = [3, 6, 12, 24]
_C.MODEL.FOCAL.WINDOW_SIZE = 7
_C.MODEL.FOCAL.MLP_RATIO = 4.0
_C.MODEL.FOCAL.QKV_BIAS = True
_C.MODEL.FOCAL.QK_SCALE = False  # False or None: head_dim ** -0.5; else a number
_C.MODEL.FOCAL.APE = False  # learned absolute position embedding
_C.MODEL.FOCAL.PATCH_NORM = True  # LayerNorm after the stem
_C.MODEL.FOCAL.USE_SHIFT = False  # shift the windows of odd blocks
_C.MODEL.FOCAL.FOCAL_POOL = "none"  # none | fc | conv | mean | max: how sub-windows become coarse tokens
_C.MODEL.FOCAL.FOCAL_STAGES = [0, 1, 2, 3]  # stages that have coarse tokens
_C.MODEL.FOCAL.FOCAL_LEVELS = [1, 1, 1, 1]  # granularities per stage: 1 is fine tokens alone
_C.MODEL.FOCAL.FOCAL_WINDOWS = [7, 5, 3, 1]  # side of the coarse neighbourhood per stage; odd
_C.MODEL.FOCAL.FOCAL_TOPK = 128  # focalv2: keys per window and level
_C.MODEL.FOCAL.EXPAND_STAGES = [0, 1, 2, 3]  # no effect
_C.MODEL.FOCAL.EXPAND_SIZES = [3, 3, 3, 3]  # focal: width of the fine ring around the window, per stage
_C.MODEL.FOCAL.EXPAND_LAYER = "all"  # all | even | odd; 'even' and 'odd' name the blocks without ring
_C.MODEL.FOCAL.USE_CONV_EMBED = False  # overlapping convolutions as stem and downsamplers
_C.MODEL.FOCAL.USE_LAYERSCALE = False
_C.MODEL.FOCAL.LAYERSCALE_VALUE = 1e-4  # initial value with USE_LAYERSCALE
_C.MODEL.FOCAL.USE_PRE_NORM = False  # normalise before each downsampler too

_C.TRAIN = CN()
_C.TRAIN.START_EPOCH = 0
_C.TRAIN.EPOCHS = 300
_C.TRAIN.WARMUP_EPOCHS = 20
_C.TRAIN.WEIGHT_DECAY = 0.05
_C.TRAIN.BASE_LR = 5e-4  # this and the next two: for 512 images per update; scaled linearly
_C.TRAIN.WARMUP_LR = 5e-7
_C.TRAIN.MIN_LR = 5e-6
_C.TRAIN.CLIP_GRAD = 5.0  # largest gradient norm; 0 measures it without clipping
_C.TRAIN.AUTO_RESUME = True  # continue from the newest checkpoint in the output folder
_C.TRAIN.ACCUMULATION_STEPS = 0  # batches per optimizer update; 0 and 1 mean one; --accumulation-steps
_C.TRAIN.USE_CHECKPOINT = False  # recompute activations in the backward pass to save memory; --use-checkpoint

_C.TRAIN.LAYER_DECAY = 1.0  # share of a layer's learning rate that the layer before it gets
_C.TRAIN.FREEZE_STAGES = -1  # not trained: -1 nothing, 0 the stem, n the first n stages too; all but the head

_C.TRAIN.BAD_STEPS_MAX = 10  # updates in a row without finite loss and gradient that end the run; all skipped

_C.TRAIN.EMA = CN()
_C.TRAIN.EMA.ENABLED = False  # keep a moving average of the weights; evaluated and saved beside them
_C.TRAIN.EMA.DECAY = 0.9999  # per update
_C.TRAIN.EMA.WARMUP = False  # begin with a smaller decay: 1 - (1 + updates) ** (-2 / 3), up to DECAY

_C.TRAIN.LR_SCHEDULER = CN()
_C.TRAIN.LR_SCHEDULER.NAME = "cosine"  # cosine | linear | step
_C.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = 30  # step
_C.TRAIN.LR_SCHEDULER.DECAY_RATE = 0.1  # step

_C.TRAIN.OPTIMIZER = CN()
_C.TRAIN.OPTIMIZER.NAME = "adamw"  # adamw | sgd | fused_adam | fused_lamb (the last two need apex)
_C.TRAIN.OPTIMIZER.EPS = 1e-8
_C.TRAIN.OPTIMIZER.BETAS = (0.9, 0.999)
_C.TRAIN.OPTIMIZER.MOMENTUM = 0.9  # sgd

_C.AUG = CN()
_C.AUG.HFLIP = 0.5  # probability of a horizontal flip
_C.AUG.SCALE = [0.08, 1.0]  # area of the random crop, as a share of the image
_C.AUG.RATIO = [0.75, 1.3333]  # its aspect ratio
_C.AUG.COLOR_JITTER = 0.4
_C.AUG.AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"  # a policy in timm's notation, or none
_C.AUG.REPROB = 0.25  # probability of random erasing
_C.AUG.REMODE = "pixel"  # const | rand | pixel
_C.AUG.RECOUNT = 1
_C.AUG.MIXUP = 0.8  # alpha; 0 switches it off
_C.AUG.CUTMIX = 1.0  # alpha; 0 switches it off
_C.AUG.CUTMIX_MINMAX = None  # None or [smallest, largest] share of the side; overrides CUTMIX
_C.AUG.MIXUP_PROB = 1.0  # probability of mixing a batch at all
_C.AUG.MIXUP_SWITCH_PROB = 0.5  # probability of CutMix when both are on
_C.AUG.MIXUP_MODE = "batch"  # batch | pair | elem

_C.TEST = CN()
_C.TEST.CROP = True  # resize larger and crop the centre, instead of resizing to IMG_SIZE

_C.AMP_OPT_LEVEL = ""  # '' (O1 on CUDA or with AMP_DTYPE, else O0) | O0 full precision | O1, O2 autocast
_C.AMP_DTYPE = ""  # '' (bf16 where the device has it, else fp16) | bf16 | fp16; --amp-dtype
_C.COMPILE = False  # torch.compile the model; --compile
_C.DEVICE = ""  # '' (cuda when available, else cpu) | cpu | cuda | cuda:N; --device
_C.OUTPUT = ""  # root of the output folders, '' is output; the run's is <OUTPUT>/<MODEL.NAME>/<TAG>
_C.TAG = "default"  # --tag
# Saving. A file that cannot be written (full disk, read-only folder) is an error in the log; older ones are
# kept and training goes on to the next save. Exit status: 0 done, 2 for what the user can correct, 75 saved
# and stopped by SIGTERM or SIGUSR1 (the same command goes on), 1 if another process died or hangs.
_C.SAVE_FREQ = 1  # epochs between checkpoints; the last epoch is always saved
_C.SAVE_STEPS = 0  # also every so many steps, after the next update; 0 for none inside epochs
_C.SAVE_MINUTES = 0.0  # also after so many minutes without a checkpoint; 0 for never
_C.SAVE_KEEP = 0  # checkpoints that stay besides best.pth, inside epochs too; 0 for all of whole epochs
_C.SAVE_ASYNC = True  # write in the background while training goes on; takes the state's size of host memory
_C.SAVE_FAILURES_MAX = 3  # failed saves in a row that end the run; a last one that fails does, too
_C.DIST_TIMEOUT_MINUTES = 30.0  # how long a process waits for one that hangs, before it ends the job
_C.DETERMINISTIC = False  # deterministic algorithms alone, an error where there is none; slower on a GPU
_C.PRINT_FREQ = 100  # steps between log lines
_C.SEED = 0  # --seed
_C.EVAL_MODE = False  # --eval
_C.EVAL_EMA = False  # with EVAL_MODE: the moving average of a training checkpoint instead of its weights
_C.THROUGHPUT_MODE = False  # --throughput
_C.DEBUG_MODE = False  # --debug
_C.LOCAL_RANK = 0  # no effect: torchrun's environment decides


# --- Types --------------------------------------------------------------------------------------------------
# A kind is (what to call it, parser); the parser returns the value or raises TypeError or ValueError.

Parser = Callable[[Any], Any]
Kind = tuple[str, Parser]


def _as_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _as_int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > MAX_INTEGER:
        raise TypeError
    return value


def _as_float(value: Any) -> float:
    """A finite number; also text such as 5e-4, which YAML 1.1 does not read as a number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str) or not math.isfinite(float(value)):
        raise TypeError
    return float(value)


def _as_text(value: Any) -> str:
    if not isinstance(value, str | None):
        raise TypeError
    return value or ""


def _as_absent(value: Any) -> bool | None:
    if value is not None and value is not False:
        raise TypeError
    return value


def _sequence(item: Parser, length: int | None = None, container: type = list) -> Parser:
    def parse(value: Any) -> Any:
        if not isinstance(value, list | tuple) or (length is not None and len(value) != length):
            raise TypeError
        return container(item(entry) for entry in value)

    return parse


def _either(*parsers: Parser) -> Parser:
    def parse(value: Any) -> Any:
        for parser in parsers:
            try:
                return parser(value)
            except (TypeError, ValueError, OverflowError):
                continue
        raise TypeError

    return parse


BOOL: Kind = ("True or False", _as_bool)
INTEGER: Kind = ("an integer", _as_int)
NUMBER: Kind = ("a number", _as_float)
TEXT: Kind = ("text", _as_text)
INTEGERS: Kind = ("a list of integers", _sequence(_as_int))
TRIPLE: Kind = ("three numbers", _sequence(_as_float, 3))
PAIR: Kind = ("two numbers", _sequence(_as_float, 2))
KIND_OF_DEFAULT: dict[type, Kind] = {bool: BOOL, int: INTEGER, float: NUMBER, str: TEXT, list: INTEGERS}
SPECIAL_KINDS: dict[str, Kind] = {
    "BASE": ("a list of yaml files", _either(_sequence(_as_text), lambda value: [_as_text(value)])),
    "DATA.IMG_SIZE": ("an integer or [height, width]", _either(_as_int, _sequence(_as_int, 2))),
    "DATA.MEAN": ("a list of numbers, one per channel", _sequence(_as_float)),
    "DATA.STD": ("a list of numbers, one per channel", _sequence(_as_float)),
    "MODEL.FOCAL.QK_SCALE": ("False, None or a number", _either(_as_absent, _as_float)),
    "TRAIN.OPTIMIZER.NAME": ("text", lambda value: _as_text(value).lower()),
    "TRAIN.LR_SCHEDULER.NAME": ("text", lambda value: _as_text(value).lower()),
    "TRAIN.OPTIMIZER.BETAS": ("two numbers", _sequence(_as_float, 2, tuple)),
    "AUG.SCALE": PAIR,
    "AUG.RATIO": PAIR,
    "AUG.CUTMIX_MINMAX": ("None or two numbers", _either(_as_absent, PAIR[1])),
}


# --- Allowed values -----------------------------------------------------------------------------------------
# A rule is (what is expected, predicate). For a list, it holds for every entry.

Rule = tuple[str, Callable[[Any], bool]]


def _one_of(*names: str) -> Rule:
    return "one of " + ", ".join(repr(name) for name in names), lambda value: value in names


AT_LEAST_1: Rule = ("1 or more", lambda value: value >= 1)
AT_LEAST_0: Rule = ("0 or more", lambda value: value >= 0)
POSITIVE: Rule = ("greater than 0", lambda value: value > 0)
PROBABILITY: Rule = ("in [0, 1]", lambda value: 0 <= value <= 1)
FRACTION: Rule = ("in [0, 1)", lambda value: 0 <= value < 1)
SHARE: Rule = ("in (0, 1]", lambda value: 0 < value <= 1)
AUGMENT_POLICY = re.compile(r"(|none|(original|originalr|v0|v0r|3a)(-.+)?|(rand|augmix)-.+)")

RULES: dict[str, Rule] = {
    "DATA.BATCH_SIZE": AT_LEAST_1,
    "DATA.DATASET": _one_of(*DATASETS),
    "DATA.IMG_SIZE": ("32 or more", lambda value: value >= 32),
    "DATA.INTERPOLATION": _one_of("random", "bilinear", "bicubic"),
    "DATA.CACHE_MODE": _one_of("no", "part", "full"),
    "DATA.NUM_WORKERS": AT_LEAST_0,
    "DATA.WORKER_START_METHOD": _one_of("", "fork", "spawn", "forkserver"),
    "DATA.DECODER": _one_of(*DECODERS),
    "DATA.STD": POSITIVE,
    "MODEL.TYPE": _one_of(*MODEL_TYPES),
    "MODEL.NAME": ("a name that can be part of a path", lambda value: bool(value.strip())),
    "MODEL.NUM_CLASSES": AT_LEAST_1,
    "MODEL.DROP_RATE": FRACTION,
    "MODEL.DROP_PATH_RATE": FRACTION,
    "MODEL.LABEL_SMOOTHING": FRACTION,
    "MODEL.ATTENTION_BACKEND": _one_of(*ATTENTION_BACKENDS),
    "MODEL.FOCAL.PATCH_SIZE": AT_LEAST_1,
    "MODEL.FOCAL.IN_CHANS": AT_LEAST_1,
    "MODEL.FOCAL.EMBED_DIM": AT_LEAST_1,
    "MODEL.FOCAL.DEPTHS": AT_LEAST_1,
    "MODEL.FOCAL.NUM_HEADS": AT_LEAST_1,
    "MODEL.FOCAL.WINDOW_SIZE": AT_LEAST_1,
    "MODEL.FOCAL.MLP_RATIO": POSITIVE,
    "MODEL.FOCAL.QK_SCALE": (
        "False, None (both mean head_dim ** -0.5) or greater than 0",
        lambda value: value is None or value is False or value > 0,
    ),
    "MODEL.FOCAL.FOCAL_POOL": _one_of("none", "fc", "conv", "mean", "max"),
    "MODEL.FOCAL.FOCAL_STAGES": AT_LEAST_0,
    "MODEL.FOCAL.FOCAL_LEVELS": (f"0 to {MAX_LEVELS}", lambda value: 0 <= value <= MAX_LEVELS),
    "MODEL.FOCAL.FOCAL_WINDOWS": AT_LEAST_1,
    "MODEL.FOCAL.FOCAL_TOPK": AT_LEAST_1,
    "MODEL.FOCAL.EXPAND_SIZES": AT_LEAST_0,
    "MODEL.FOCAL.EXPAND_LAYER": _one_of("all", "even", "odd"),
    "MODEL.FOCAL.LAYERSCALE_VALUE": POSITIVE,
    "TRAIN.START_EPOCH": AT_LEAST_0,
    "TRAIN.EPOCHS": AT_LEAST_1,
    "TRAIN.WARMUP_EPOCHS": AT_LEAST_0,
    "TRAIN.WEIGHT_DECAY": AT_LEAST_0,
    "TRAIN.BASE_LR": POSITIVE,
    "TRAIN.WARMUP_LR": AT_LEAST_0,
    "TRAIN.MIN_LR": AT_LEAST_0,
    "TRAIN.CLIP_GRAD": AT_LEAST_0,
    "TRAIN.ACCUMULATION_STEPS": AT_LEAST_0,
    "TRAIN.LAYER_DECAY": SHARE,
    "TRAIN.FREEZE_STAGES": ("-1 or more", lambda value: value >= -1),
    "TRAIN.BAD_STEPS_MAX": AT_LEAST_1,
    "TRAIN.EMA.DECAY": FRACTION,
    "TRAIN.LR_SCHEDULER.NAME": _one_of(*SCHEDULERS),
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": AT_LEAST_1,
    "TRAIN.LR_SCHEDULER.DECAY_RATE": SHARE,
    "TRAIN.OPTIMIZER.NAME": _one_of(*OPTIMIZERS),
    "TRAIN.OPTIMIZER.EPS": POSITIVE,
    "TRAIN.OPTIMIZER.BETAS": FRACTION,
    "TRAIN.OPTIMIZER.MOMENTUM": FRACTION,
    "AUG.HFLIP": PROBABILITY,
    "AUG.SCALE": SHARE,
    "AUG.RATIO": POSITIVE,
    "AUG.COLOR_JITTER": AT_LEAST_0,
    "AUG.AUTO_AUGMENT": (
        "none, or a policy of timm such as rand-m9-mstd0.5-inc1",
        lambda value: AUGMENT_POLICY.fullmatch(value) is not None,
    ),
    "AUG.REPROB": PROBABILITY,
    "AUG.REMODE": _one_of("const", "rand", "pixel"),
    "AUG.RECOUNT": AT_LEAST_1,
    "AUG.MIXUP": AT_LEAST_0,
    "AUG.CUTMIX": AT_LEAST_0,
    "AUG.CUTMIX_MINMAX": PROBABILITY,
    "AUG.MIXUP_PROB": PROBABILITY,
    "AUG.MIXUP_SWITCH_PROB": PROBABILITY,
    "AUG.MIXUP_MODE": _one_of("batch", "pair", "elem"),
    "AMP_OPT_LEVEL": _one_of("", "O0", "O1", "O2"),
    "AMP_DTYPE": _one_of("", "bf16", "fp16"),
    "DEVICE": ("'', cpu, cuda or cuda:N", lambda value: re.fullmatch(r"|cpu|cuda(:\d+)?", value) is not None),
    "SAVE_FREQ": AT_LEAST_1,
    "SAVE_STEPS": AT_LEAST_0,
    "SAVE_MINUTES": AT_LEAST_0,
    "SAVE_KEEP": AT_LEAST_0,
    "SAVE_FAILURES_MAX": AT_LEAST_1,
    "DIST_TIMEOUT_MINUTES": POSITIVE,
    "PRINT_FREQ": AT_LEAST_1,
    "SEED": AT_LEAST_0,
}


def _combinations(config: CN) -> Iterator[tuple[str, str]]:
    """Problems of values that are fine one by one, as (key, message)."""
    model, train, aug = config.MODEL, config.TRAIN, config.AUG
    if config.DATA.ZIP_MODE and config.DATA.DATASET == "imagenet22k":
        yield "DATA.ZIP_MODE", "expected False with DATASET imagenet22k, got True; unpack it to folders"
    if config.EVAL_MODE and not (model.RESUME or model.PRETRAINED):
        yield "EVAL_MODE", "expected weights to evaluate, got none; name them with --resume or --pretrained"
    if train.WARMUP_EPOCHS > train.EPOCHS:
        yield (
            "TRAIN.WARMUP_EPOCHS",
            f"expected at most TRAIN.EPOCHS = {train.EPOCHS}, got {train.WARMUP_EPOCHS}; shorten the warm-up",
        )
    if train.START_EPOCH > train.EPOCHS:
        yield (
            "TRAIN.START_EPOCH",
            f"expected at most TRAIN.EPOCHS = {train.EPOCHS}, got {train.START_EPOCH}; start earlier",
        )
    for name in ("SCALE", "RATIO", "CUTMIX_MINMAX"):
        values = aug[name] or (0, 0)
        if values[0] > values[1]:
            yield f"AUG.{name}", f"expected [smaller, larger], got {list(values)}; swap them"
    if model.RESUME and model.PRETRAINED:
        yield (
            "MODEL.PRETRAINED",
            f"expected either this or MODEL.RESUME, got both ({model.PRETRAINED!r} and {model.RESUME!r}); "
            "use RESUME to continue a run, PRETRAINED to start from weights",
        )
    if config.AMP_OPT_LEVEL == "O0" and config.AMP_DTYPE:
        yield (
            "AMP_DTYPE",
            f"expected '' with AMP_OPT_LEVEL O0 (full precision), got {config.AMP_DTYPE!r}; drop one",
        )
    modes = [name for name in ("EVAL_MODE", "THROUGHPUT_MODE", "DEBUG_MODE") if config[name]]
    weights = model.RESUME or model.PRETRAINED
    if weights and (config.THROUGHPUT_MODE or config.DEBUG_MODE):
        yield (
            modes[0],
            f"expected no weights, which it does not use, got {weights!r}; drop --resume or --pretrained",
        )
    if len(modes) > 1:
        yield modes[1], f"expected at most one mode, got {' and '.join(modes)}; choose one"


def _fine_tuning(config: CN) -> Iterator[tuple[str, str]]:
    """Problems of what a run starts from and what it leaves alone, as (key, message)."""
    model, stages, frozen = config.MODEL, len(config.MODEL.FOCAL.DEPTHS), config.TRAIN.FREEZE_STAGES
    if model.RESET_HEAD and (config.EVAL_MODE or not model.PRETRAINED):
        yield (
            "MODEL.RESET_HEAD",
            "expected only to train from MODEL.PRETRAINED, got True otherwise; name the weights or drop it",
        )
    if model.HEAD_CLASS_MAP and (config.EVAL_MODE or model.RESET_HEAD or not model.PRETRAINED):
        yield (
            "MODEL.HEAD_CLASS_MAP",
            "expected only to train from MODEL.PRETRAINED, without MODEL.RESET_HEAD, got "
            f"{model.HEAD_CLASS_MAP!r} otherwise; name the weights, and choose one of the two",
        )
    if frozen > stages:
        yield (
            "TRAIN.FREEZE_STAGES",
            f"expected at most {stages}, the number of stages, got {frozen}; lower it",
        )


def _stages(config: CN) -> Iterator[tuple[str, str]]:
    """Problems of the lists that describe the stages, as (key, message)."""
    focal = config.MODEL.FOCAL
    count = len(focal.DEPTHS)
    if not 1 <= count <= MAX_STAGES:
        yield "MODEL.FOCAL.DEPTHS", f"expected 1 to {MAX_STAGES} stages, got {count}; name one entry for each"
        return
    per_stage = ("NUM_HEADS", "FOCAL_LEVELS", "FOCAL_WINDOWS", "EXPAND_SIZES")
    ragged = [name for name in per_stage if len(focal[name]) != count]
    for name in ragged:
        yield (
            f"MODEL.FOCAL.{name}",
            f"expected {count} entries, one per stage as in DEPTHS {focal.DEPTHS}, got {focal[name]}; "
            "make the lists equally long",
        )
    if ragged:
        return
    for stage in range(count):
        dim, heads = focal.EMBED_DIM * 2**stage, focal.NUM_HEADS[stage]
        if dim % heads:
            yield (
                "MODEL.FOCAL.NUM_HEADS",
                f"expected a divisor of stage {stage}'s {dim} channels, got {heads}; change it or EMBED_DIM",
            )
        levels, window = focal.FOCAL_LEVELS[stage], focal.FOCAL_WINDOWS[stage]
        pools = focal.FOCAL_POOL != "none" and stage in focal.FOCAL_STAGES
        if config.MODEL.TYPE == "focal" and levels > 1 and pools and window % 2 == 0:
            yield (
                "MODEL.FOCAL.FOCAL_WINDOWS",
                f"expected an odd number for stage {stage}, got {window}; use {window - 1} or {window + 1}",
            )
        if levels > 1 and pools and focal.WINDOW_SIZE // 2 ** (levels - 2) < 1:
            yield (
                "MODEL.FOCAL.FOCAL_LEVELS",
                f"expected a WINDOW_SIZE of {2 ** (levels - 2)} or more for {levels} levels, got "
                f"{focal.WINDOW_SIZE}; use fewer levels",
            )
        if config.MODEL.TYPE == "focal" and levels > 3:
            yield (
                "MODEL.FOCAL.FOCAL_LEVELS",
                f"expected 3 or less in every stage of focal, got {levels} in stage {stage}; use 3 or less",
            )
        if config.MODEL.TYPE == "focal" and focal.EXPAND_SIZES[stage] > focal.WINDOW_SIZE:
            yield (
                "MODEL.FOCAL.EXPAND_SIZES",
                f"expected at most WINDOW_SIZE = {focal.WINDOW_SIZE}, got {focal.EXPAND_SIZES[stage]} in "
                f"stage {stage}; use a narrower ring",
            )
        if config.MODEL.TYPE == "focalv2" and levels not in (1, 2):
            yield (
                "MODEL.FOCAL.FOCAL_LEVELS",
                f"expected 1 or 2 in every stage of focalv2, got {levels} in stage {stage}; use 1 or 2",
            )
        if config.MODEL.TYPE == "focalv2" and levels == 2 and not pools:
            yield (
                "MODEL.FOCAL.FOCAL_LEVELS",
                f"expected 1 in stage {stage}, which has no pooling in focalv2, got 2; set FOCAL_POOL and "
                "FOCAL_STAGES, or use 1",
            )


def _map_sides(config: CN, side: int) -> Iterator[int]:
    """A side of the map of every stage, for an image of that side."""
    overlaps = config.MODEL.FOCAL.USE_CONV_EMBED
    for stride in (config.MODEL.FOCAL.PATCH_SIZE, *[2] * (len(config.MODEL.FOCAL.DEPTHS) - 1)):
        kernel, padding = (2 * stride - 1, stride // 2) if overlaps else (stride, 0)
        side = (side + 2 * padding - kernel) // stride + 1
        yield side


def _maps(config: CN) -> Iterator[tuple[str, str]]:
    """Problems of the image size with the stages, as (key, message)."""
    size = config.DATA.IMG_SIZE
    for side in {size} if isinstance(size, int) else set(size):
        empty = [stage for stage, length in enumerate(_map_sides(config, side)) if length < 1]
        if empty:
            yield (
                "DATA.IMG_SIZE",
                f"expected a token or more in every stage, got none in stage {empty[0]} for a side "
                f"of {side} with MODEL.FOCAL.PATCH_SIZE {config.MODEL.FOCAL.PATCH_SIZE} and "
                f"{len(config.MODEL.FOCAL.DEPTHS)} stages; use larger images, smaller patches or fewer "
                "stages",
            )


# What has an effect only together with something else: key -> (what that is, whether it is so). Yaml files
# may hold such keys in store; on the command line they are a mistake.
CONDITIONS: dict[str, tuple[str, Callable[[CN], bool]]] = {
    "DATA.CACHE_MODE": (
        "DATA.ZIP_MODE (--zip)",
        lambda config: config.DATA.ZIP_MODE or config.DATA.CACHE_MODE == "no",
    ),
    "MODEL.FOCAL.LAYERSCALE_VALUE": (
        "MODEL.FOCAL.USE_LAYERSCALE True",
        lambda config: config.MODEL.FOCAL.USE_LAYERSCALE,
    ),
    "EVAL_EMA": ("EVAL_MODE (--eval)", lambda config: config.EVAL_MODE or not config.EVAL_EMA),
    "TRAIN.EMA.DECAY": ("TRAIN.EMA.ENABLED True", lambda config: config.TRAIN.EMA.ENABLED),
    "TRAIN.EMA.WARMUP": ("TRAIN.EMA.ENABLED True", lambda config: config.TRAIN.EMA.ENABLED),
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": (
        "TRAIN.LR_SCHEDULER.NAME step",
        lambda config: config.TRAIN.LR_SCHEDULER.NAME == "step",
    ),
    "TRAIN.LR_SCHEDULER.DECAY_RATE": (
        "TRAIN.LR_SCHEDULER.NAME step",
        lambda config: config.TRAIN.LR_SCHEDULER.NAME == "step",
    ),
    "TRAIN.OPTIMIZER.MOMENTUM": (
        "TRAIN.OPTIMIZER.NAME sgd",
        lambda config: config.TRAIN.OPTIMIZER.NAME == "sgd",
    ),
}


# --- Loading ------------------------------------------------------------------------------------------------


def load_config(cfg_file: str | Path | None = None, opts: Sequence[Any] = ()) -> CN:
    """The defaults, overridden by a yaml file and then by ``opts``; checked and frozen.

    Args:
        cfg_file: yaml (or JSON) file; its BASE files are merged before it.
        opts: flat list ``KEY VALUE KEY VALUE ...``; values are text as on the command line, or objects.

    Raises:
        ValueError: listing every problem found.
    """
    loader = _Loader()
    if cfg_file is not None:
        loader.merge_file(Path(cfg_file), ())
    loader.merge_opts(list(opts))
    config = loader.config
    if config.DATA.DATASET == "imagewoof" and "MODEL.NUM_CLASSES" not in loader.origin:
        config.MODEL.NUM_CLASSES = 10
    loader.check()
    if loader.problems:
        count = len(loader.problems)
        shown = loader.problems[:SHOWN_PROBLEMS] + ["..."] * (count > SHOWN_PROBLEMS)
        file = "" if cfg_file is None else f" of {_shown(str(cfg_file))}"
        raise ValueError(f"{count} problem(s) in the configuration{file}:\n  - " + "\n  - ".join(shown))
    config.BASE = [""]  # merged already: the dumped config stands on its own
    config.freeze()
    return config


def parse_yaml(text: str) -> Any:
    """Plain values from yaml text that nobody vouches for.

    Raises:
        ValueError: not plain values; the message is the reason, in one line.
    """
    if not isinstance(text, str) or len(text) > MAX_YAML:
        raise ValueError(f"expected text of at most {MAX_YAML:,} letters")
    try:
        return yaml.load(text, _PlainLoader)
    except RecursionError as error:
        raise ValueError("too deeply nested") from error
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        raise ValueError(_shown(str(error)) or type(error).__name__) from error


class _PlainLoader(yaml.SafeLoader):
    """yaml's safe loader without aliases, which let a short text grow without end, and repeated keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError(f"expected values, got the alias *{self.peek_event().anchor}; write its value")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in getattr(node, "value", ()):
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name in seen:
                raise ValueError(f"line {key.start_mark.line + 1}: key {_shown(name)} stands there twice")
            seen.add(name)
        return super().construct_mapping(node, deep)


def _shown(value: Any) -> str:
    """A value for a message: in one line, and not endless."""
    try:
        text = value if isinstance(value, str) else reprlib.repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a long {type(value).__name__}"
    text = " ".join(text.split())
    text = text if len(text) <= SHOWN_LETTERS else f"{text[:SHOWN_LETTERS]}..."
    return text if text.isprintable() else repr(text)


def _quoted(value: Any) -> str:
    return repr(_shown(value)) if isinstance(value, str) else _shown(value)


def flatten(node: CN, prefix: str = "") -> dict[str, Any]:
    """Every option of a config as {dotted key: value}; the free-form section MODEL.SPEC is one value."""
    flat: dict[str, Any] = {}
    for name, value in node.items():
        if isinstance(value, CN) and not value.is_new_allowed():
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


class _Loader:
    """Merges sources into a copy of the defaults; collects problems instead of stopping at the first."""

    def __init__(self) -> None:
        self.config = _C.clone()
        self.defaults = flatten(_C)
        self.origin: dict[str, str] = {}  # key -> where its value came from
        self.wrong: set[str] = set()  # keys whose value could not be taken
        self.problems: list[str] = []
        self.files = 0

    def merge_file(self, path: Path, parents: tuple[Path, ...]) -> None:
        self.files += 1
        named_by = f" (named by BASE in {parents[-1]})" if parents else ""
        if self.files > MAX_FILES:
            self.problems += [f"{path}: expected at most {MAX_FILES} files{named_by}; remove some"] * (
                self.files == MAX_FILES + 1
            )
            return
        try:
            path = Path(os.path.realpath(path))
            if path in parents:
                chain = " -> ".join(str(step) for step in (*parents, path))
                self.problems.append(f"{path}: BASE: expected no cycle, got {chain}; remove one of these")
                return
            if path.exists() and not path.is_file():
                raise OSError(errno.EINVAL, "no plain file")
            with path.open(encoding="utf-8") as file:
                content = parse_yaml(file.read(MAX_YAML + 1))
        except OSError as error:
            self.problems.append(
                f"{path}: expected a readable yaml file{named_by}, got {error.strerror}; check the path"
            )
            return
        except ValueError as error:
            self.problems.append(
                f"{_shown(str(path))}: expected valid yaml of plain values{named_by}, got: "
                f"{_shown(str(error))}; correct the file"
            )
            return
        content = {} if content is None else content
        if not isinstance(content, dict):
            self.problems.append(
                f"{path}: expected KEY: value lines, got {_shown(content)}; correct the file"
            )
            return
        self.config.BASE = [""]
        self.assign("BASE", content.pop("BASE", [""]), str(path))
        for base in self.config.BASE:
            if base:
                self.merge_file(path.parent / base, (*parents, path))
        self.merge_section("", content, str(path))

    def merge_section(self, prefix: str, content: dict[Any, Any], where: str) -> None:
        for name, value in content.items():
            key = f"{prefix}{_shown(name)}"
            is_section = any(known.startswith(f"{key}.") for known in self.defaults)
            if not is_section:
                self.assign(key, value, where)
            elif isinstance(value, dict | None):
                self.merge_section(f"{key}.", value or {}, where)
            else:
                self.problems.append(
                    f"{where}: {key}: expected a section with keys of its own, got {_shown(value)}; indent"
                )

    def merge_opts(self, opts: list[Any]) -> None:
        if len(opts) % 2:
            self.problems.append(
                f"--opts: expected KEY VALUE pairs, got {len(opts)} words: {' '.join(map(str, opts))}; "
                "give every key one value"
            )
            return
        for key, value in zip(opts[::2], opts[1::2], strict=True):
            self.assign(str(key), value, COMMAND_LINE)

    def assign(self, key: str, value: Any, where: str) -> None:
        """Check the type of ``value`` and set it."""
        if key.startswith("MODEL.SPEC."):
            return  # free-form and without effect
        if key not in self.defaults:
            few = len(self.problems) < SHOWN_PROBLEMS  # more are not shown, and the search is slow
            close = difflib.get_close_matches(key, self.defaults, n=1, cutoff=0.5) if few else []
            hint = f"did you mean {close[0]}?" if close else "see config.py for all keys"
            self.problems.append(f"{where}: {key}: expected a known key, got {key!r}; {hint}")
            return
        default = self.defaults[key]
        if isinstance(default, CN):
            return
        expected, parse = SPECIAL_KINDS.get(key) or KIND_OF_DEFAULT[type(default)]
        decoded = value if isinstance(default, str) else _decode(value)
        try:
            parsed = parse(decoded)
        except (TypeError, ValueError, OverflowError):
            self.wrong.add(key)
            got = f"{_quoted(value)} ({type(decoded).__name__})"
            self.problems.append(f"{where}: {key}: expected {expected}, got {got}; correct the value")
            return
        *sections, name = key.split(".")
        node = self.config
        for section in sections:
            node = node[section]
        node[name] = parsed
        self.origin[key] = where

    def check(self) -> None:
        """Check all values, then their combinations if the values are fine."""
        for key, value in flatten(self.config).items():
            expected, holds = RULES.get(key, ("", lambda value: True))
            entries = value if isinstance(value, list | tuple) else [value]
            if key == "AUG.CUTMIX_MINMAX" and not value:
                continue
            if not all(holds(entry) for entry in entries):
                each = " for every entry" if len(entries) > 1 else ""
                self.wrong.add(key)
                self.complain(key, f"expected {expected}{each}, got {_quoted(value)}; correct the value")
        groups = (
            *((_stages, ("MODEL.",)), (_maps, ("MODEL.", "DATA.IMG_SIZE"))),
            *((_combinations, ("",)), (_fine_tuning, ("",))),
        )
        for group, keys in groups:
            if not any(key.startswith(keys) for key in self.wrong):
                for key, message in group(self.config):
                    self.complain(key, message)
        for key, (condition, holds) in CONDITIONS.items():
            if self.origin.get(key) == COMMAND_LINE and not holds(self.config):
                value = flatten(self.config)[key]
                self.complain(
                    key, f"expected {condition} along with it, got only {value!r}; add that or drop it"
                )

    def complain(self, key: str, message: str) -> None:
        self.problems.append(f"{self.origin.get(key, 'default')}: {key}: {message}")


def _decode(value: Any) -> Any:
    """Text as a Python value: '[2, 2]', 'None', 'true', '5e-4'; left alone if it is none of them."""
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        return value
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # the last two: nested brackets
        pass
    try:
        return parse_yaml(value)
    except ValueError:
        return value
