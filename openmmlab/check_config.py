"""Finds mistakes in a config that mmengine ignores, reports by a traceback or notices after the first epoch:
options that nothing reads, values that a library refuses, unknown metrics. Messages name the key."""

import inspect
import sysconfig
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mmcv.cnn import build_conv_layer, build_norm_layer
from mmengine.config import DictAction
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import CheckpointHook
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import build_from_cfg
from mmengine.runner import Runner

from utils import UserError

if TYPE_CHECKING:
    from mmengine.config import Config

OTHER_OPTIONS = {  # options that are not arguments of `Runner`, but read by it or by other code
    *("activation_checkpointing", "compile", "cudnn_benchmark", "efficient_conv_bn_eval"),
    *("find_unused_parameters", "model_wrapper_cfg", "sync_bn"),
    *("tta_model", "tta_pipeline"),
}
KNOWN_OPTIONS = OTHER_OPTIONS | {*inspect.signature(Runner).parameters}
NUMBER_OR_TEXT = ("loss_scale", "priority")  # 512.0 or dynamic, 70 or LOW
READ_KEYS = {  # of dicts without a type, all keys that the Runner reads
    "auto_scale_lr": {"enable", "base_batch_size"},
    "env_cfg": {"cudnn_benchmark", "mp_cfg", "dist_cfg", "resource_limit"},
    "randomness": {*inspect.signature(Runner.set_randomness).parameters} - {"self"},
}
BUILDERS = {
    **{function.__code__: "cfg" for function in (build_from_cfg, build_norm_layer, build_conv_layer)},
    DefaultOptimWrapperConstructor.__call__.__code__: "optimizer_cfg",
    Runner.build_dataloader.__code__: "dataloader",
    Runner.build_optim_wrapper.__code__: "optim_wrapper",
}
"""Code that builds a part of the config, and which of its arguments is that part."""

PACKAGES = ("detection", "mmcv", "mmdet", "mmengine", "mmseg", "numpy", "torch", "torchvision")
REFUSALS = (ValueError, TypeError, LookupError, AssertionError, ImportError, NotImplementedError)
"""Of values, by a library."""

NMS_TYPES = ("nms", "soft_nms", "nms_rotated", "nms_quadri")  # functions of mmcv.ops
COCO_ITEMS = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")  # what CocoMetric reports of each metric
IOU_ITEMS = {  # what IoUMetric reports, by its iou_metrics
    "mIoU": ("mIoU", "mAcc"),
    "mDice": ("mDice", "mAcc"),
    "mFscore": ("mFscore", "mPrecision", "mRecall"),
}


class Options(DictAction):
    """The values of --cfg-options; refuses those that are not KEY=VALUE."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        for value in values:
            if not value.partition("=")[0] or "=" not in value:
                raise UserError(
                    f"{option_string}: expected KEY=VALUE, without spaces around =, got {value!r}"
                )
            try:
                super().__call__(parser, namespace, [value], option_string)
            except (ValueError, AssertionError, RecursionError) as error:  # of mmengine, for brackets
                raise UserError(
                    f"{option_string}: expected a number, text, or list of these as in KEY=[1,2], got "
                    f"{value}; write other values into a config file"
                ) from error


def check_overrides(config: "Config", options: Mapping[str, Any]) -> None:
    """Check --cfg-options, a mapping from keys to values, against the config that they will change.

    Most code refuses unknown keywords when it is built, see `explained_by_config`. Some ignores them, so a
    new key that has a letter more or less than an existing one, or two letters swapped, is refused here,
    unless there is a digit in it.

    Raises:
        UserError: a first part that nothing reads, a misspelt key, no such entry of a list, or text in place
            of a number.
    """
    for key, value in options.items():
        first, *rest = key.split(".")
        if first == "data_preprocessor" and first in (config.get("model") or {}):
            raise UserError(f"--cfg-options {key}: nothing reads it beside model.{first}; set that")
        if first not in KNOWN_OPTIONS:
            known = (
                f"only the config file itself reads {first}; set the keys where it is used, such as "
                "train_dataloader.dataset.data_root or test_dataloader.dataset.pipeline"
                if first in config
                else f"the config has no {first}{_suggestion(first, {*KNOWN_OPTIONS, *config})}"
            )
            raise UserError(f"--cfg-options {key}: {known}")
        node, path = config.get(first), first
        for name in rest:
            if isinstance(node, list | tuple):
                if not name.isdecimal() or int(name) >= len(node):
                    raise UserError(f"--cfg-options {key}: {path} is a list of {len(node)}, got {name}")
                node = node[int(name)]
            else:
                node = node if isinstance(node, Mapping) else {}
                known = READ_KEYS.get(path)
                if known and name not in known:
                    raise UserError(f"--cfg-options {key}: nothing reads {name}{_suggestion(name, known)}")
                meant = [other for other in node if _one_letter_off(name, other)]
                is_free = any(map(str.isdigit, name)) or path.endswith("custom_keys")
                if meant and name not in node and not is_free:
                    raise UserError(f"--cfg-options {key}: there is no {name}; did you mean {meant[0]}?")
                node = node.get(name)
            path = f"{path}.{name}"
        was_number = path == key and isinstance(node, int | float) and not key.endswith(NUMBER_OR_TEXT)
        if was_number and isinstance(value, str):
            expected = "True or False" if isinstance(node, bool) else "a number"
            raise UserError(f"--cfg-options {key}: expected {expected}, as in the config, got {value!r}")


def _one_letter_off(a: str, b: str) -> bool:
    """Whether one word has a letter more than the other, or two neighbours in the other order."""
    longer, shorter = sorted((a, b), key=len, reverse=True)
    shortened = {longer[:i] + longer[i + 1 :] for i in range(len(longer))}
    return shorter in shortened or b in {a[:i] + a[i + 1] + a[i] + a[i + 2 :] for i in range(len(a) - 1)}


@contextmanager
def explained_by_config(config: "Config") -> Iterator[None]:
    """Context manager for what builds from a config: an error of a library's own code, while it built a part,
    becomes a sentence with that part's key.

    Raises:
        UserError: a library refused an unknown type, an unknown keyword or a value. Other errors pass: those
            of the user's own code, and OSErrors.
    """
    try:
        yield
    except (UserError, OSError):
        raise
    except REFUSALS as error:
        if said := _refusal(error, config):
            raise UserError(f"{said} (FOCAL_TRACEBACK=1 shows where)") from error
        raise


def _refusal(error: Exception, config: "Config") -> str | None:
    """The key of the part of the config that was being built when a library raised an error, and what is
    wrong with it. None if there is none, or if the user's own code was building it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    libraries = _library_folders()
    for frame in reversed(frames):
        if not frame.f_code.co_filename.startswith(libraries):
            return None
        part = frame.f_locals.get(BUILDERS.get(frame.f_code, ""))
        places = _places(part, config) if isinstance(part, Mapping) else []
        if places:
            said = str(error.args[0] if error.args else "")  # str() of a KeyError adds quotes
            if not said and isinstance(error, NotImplementedError) and "self" in frames[-1].f_locals:
                said = f"{type(frames[-1].f_locals['self']).__name__} does not support this model"
            said = said or traceback.extract_tb(error.__traceback__)[-1].line  # of an assert without message
            kind, registry = part.get("type"), frame.f_locals.get("registry")
            if isinstance(kind, str) and registry is not None and registry.get(kind) is None:
                known = {*registry.module_dict, *(registry.parent or registry).module_dict}
                said = f"there is no {kind}{_suggestion(kind, known)}"
            return f"{' or '.join(places)}: {said}"
    return None


def _library_folders() -> tuple[str, ...]:
    """How file names of code that is not the user's begin."""
    found = [find_spec(name) for name in PACKAGES]
    folders = [folder for spec in found if spec for folder in spec.submodule_search_locations or ()]
    return (sysconfig.get_path("stdlib"), "<frozen ", *folders)


def _places(part: Mapping[str, Any], config: "Config") -> list[str]:
    """Dotted keys, with types, of the dicts of the config that became a part: those that have most of its
    keys and values, since code may have added some; where none has all its values in the part, its keys."""
    options = {key: value for key, value in config.to_dict().items() if key in KNOWN_OPTIONS}
    alike = {
        path: node
        for path, node in nodes(options, "")
        if path and node and node.get("type") == part.get("type") and node.keys() <= part.keys()
    }
    same = {
        path: node
        for path, node in alike.items()
        if all(str(part[key]) == str(value) for key, value in node.items())
    }
    found = same or alike
    most = max(map(len, found.values()), default=0)
    kind = f" ({part['type']})" if isinstance(part.get("type"), str) else ""
    return [f"{path}{kind}" for path, node in found.items() if len(node) == most]


def check_nms(config: "Config") -> None:
    """Check the types of non-maximum suppression, which mmcv looks up when there are boxes to suppress.

    Raises:
        UserError: a misspelt type.
    """
    parts = {name: config.get(name) for name in ("model", "tta_model")}
    for path, node in nodes(parts, ""):
        kind = node.get("type", "nms")  # which a user's own head may read in its own way
        is_known = not isinstance(kind, str) or kind in NMS_TYPES
        if path.endswith(".nms") and not is_known and get_close_matches(kind, NMS_TYPES):
            raise UserError(f"{path}.type: expected one of {', '.join(NMS_TYPES)}, got {kind!r}")


def check_saving(runner: Runner) -> None:
    """Check what mmengine would notice only after the first epoch; warn of a choice that can lose a run.

    Raises:
        UserError: unknown options of CheckpointHook, or a best metric that no evaluator reports.
    """
    takers = (CheckpointHook, Runner.save_checkpoint)
    known = {name for taker in takers for name in inspect.signature(taker).parameters}
    evaluator = getattr(runner.val_loop, "evaluator", None)
    metrics = evaluator.metrics if type(evaluator) is Evaluator else []
    reported = [reported_metrics(metric) for metric in metrics]
    names = {"auto", *(name for names in reported for name in names or ())}
    for hook in runner.hooks:
        if not isinstance(hook, CheckpointHook):
            continue
        if unknown := sorted({*hook.args} - known):
            raise UserError(f"CheckpointHook takes no {unknown[0]}{_suggestion(unknown[0], known)}")
        if hook.max_keep_ckpts == 1:
            runner.logger.warning(
                "max_keep_ckpts=1: mmengine removes the only checkpoint before it writes the next; keep 2, "
                "as a machine may go down in between"
            )
        for name in hook.save_best or ():
            if reported and None not in reported and name not in names:
                raise UserError(
                    f"default_hooks.checkpoint.save_best: expected one of {', '.join(sorted(names))}, as "
                    f"val_evaluator reports, got {name}"
                )


def reported_metrics(metric: BaseMetric) -> set[str] | None:
    """Names of the values that CocoMetric or IoUMetric reports; None for other evaluators and options."""
    kind, prefix = type(metric).__name__, f"{metric.prefix}/" if metric.prefix else ""
    if kind == "CocoMetric" and not metric.classwise and {*metric.metrics} <= {"bbox", "segm"}:
        items = metric.metric_items or COCO_ITEMS
        return {f"{prefix}{name}_{item}" for name in metric.metrics for item in items}
    if kind == "IoUMetric":
        names = [metric.metrics] if isinstance(metric.metrics, str) else metric.metrics
        if unknown := sorted({*names} - {*IOU_ITEMS}):
            raise UserError(f"IoUMetric: expected iou_metrics of {', '.join(IOU_ITEMS)}, got {unknown[0]!r}")
        return {f"{prefix}{item}" for name in names for item in ("aAcc", *IOU_ITEMS[name])}
    return None


def nodes(value: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """All dicts in a nested value, with their dotted keys; `path` is the value's own."""
    if isinstance(value, dict):
        yield path, value
        value = value.items()
    elif isinstance(value, list | tuple):
        value = enumerate(value)
    else:
        return
    for name, part in value:
        yield from nodes(part, f"{path}.{name}" if path else str(name))


def _suggestion(name: str, known: set[str]) -> str:
    """The end of a message: known names that are similar to an unknown one."""
    near = get_close_matches(name, known, n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else "; check its spelling"
