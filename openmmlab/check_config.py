"""Finds mistakes in a config that mmengine ignores or reports by a traceback: options that nothing reads,
unknown types, unknown keywords. Messages name the key."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

import mmengine.registry
from mmengine.config import DictAction
from mmengine.evaluator import Evaluator
from mmengine.hooks import CheckpointHook
from mmengine.registry import Registry
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from utils import UserError

if TYPE_CHECKING:
    from mmengine.config import Config

OTHER_OPTIONS = {  # options that are not arguments of `Runner`, but read by it or by other code
    *("activation_checkpointing", "compile", "cudnn_benchmark", "efficient_conv_bn_eval"),
    *("find_unused_parameters", "model_wrapper_cfg", "sync_bn"),
    *("test_pipeline", "tta_model", "tta_pipeline"),
}
KNOWN_OPTIONS = OTHER_OPTIONS | {*inspect.signature(Runner).parameters}
NOT_OF_A_REGISTRY = ("nms", "roi_layer")  # keys of dicts whose type is found in another way
TAKEN_OUT = {  # keywords that builders take out of a dict: of norms, schedules, optimizers, hooks, ...
    *("requires_grad", "convert_to_iter_based", "by_epoch", "paramwise_cfg", "constructor", "priority"),
    *("scale_factor", "fallback_on_stride", "deformable_groups", "_scope_"),
}
NUMBER_OR_TEXT = "loss_scale"  # 512.0 or dynamic


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


def check_options(config: "Config", options: Mapping[str, Any]) -> None:
    """Check --cfg-options, a mapping from keys to values, against the config that they will change.

    What takes them refuses unknown keywords when it is built, see `explained_by_config`.

    Raises:
        UserError: a first part that nothing reads, no such entry of a list, or text in place of a number.
    """
    for key, value in options.items():
        first, *rest = key.split(".")
        if first not in KNOWN_OPTIONS:
            known = (
                f"only the config file itself reads {first}; set the keys where it is used, such as "
                "train_dataloader.dataset.data_root"
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
            elif isinstance(node, Mapping):
                node = node.get(name)
            else:
                break
            path = f"{path}.{name}"
        was_number = path == key and isinstance(node, int | float) and not key.endswith(NUMBER_OR_TEXT)
        if was_number and isinstance(value, str):
            expected = "True or False" if isinstance(node, bool) else "a number"
            raise UserError(f"--cfg-options {key}: expected {expected}, as in the config, got {value!r}")


@contextmanager
def explained_by_config(config: "Config") -> Iterator[None]:
    """Context manager for building from a config: if that fails, look for mistakes in the config.

    Looking alone would refuse configs that run, since some code reads a part in its own way.

    Raises:
        UserError: building failed, and there are some. Without any, the error passes, and OSErrors always do.
    """
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        if found := mistakes(config):
            raise UserError("\n".join(found)) from error
        raise


def mistakes(config: "Config") -> list[str]:
    """A sentence for each type that is in no registry, and each keyword that nothing of its type takes."""
    used = {key: value for key, value in config.to_dict().items() if key in KNOWN_OPTIONS}
    found = []
    for path, node in _nodes(used, ""):
        kind, candidates = node.get("type"), _candidates(path, node, config)
        if isinstance(kind, str) and not candidates and not path.endswith(NOT_OF_A_REGISTRY):
            found.append(f"{path}.type: there is no {kind}{_instead_of_type(kind, config)}")
        keywords = [_keywords(candidate) for candidate in candidates]
        known = {name for names in keywords for name in names or ()}
        if candidates and None not in keywords:
            for name in sorted(node.keys() - known - TAKEN_OUT - {"type"}):
                found.append(f"{path}: {candidates[0].__name__} takes no {name}{_suggestion(name, known)}")
    return found


def check_saving(runner: Runner) -> None:
    """Check what mmengine would notice only after the first epoch.

    Raises:
        UserError: unknown options of CheckpointHook, or a best metric that no evaluator reports.
    """
    evaluator = getattr(runner.val_loop, "evaluator", None)
    evaluators = evaluator.metrics if type(evaluator) is Evaluator else []
    prefixes = tuple(f"{metric.prefix}/" for metric in evaluators if metric.prefix)
    all_begin_so = evaluators and len(prefixes) == len(evaluators)
    takers = (CheckpointHook, type(runner).save_checkpoint)
    known = {name for taker in takers for name in inspect.signature(taker).parameters}
    for hook in runner.hooks:
        if not isinstance(hook, CheckpointHook):
            continue
        if unknown := sorted({*hook.args} - known):
            raise UserError(f"CheckpointHook takes no {unknown[0]}{_suggestion(unknown[0], known)}")
        for name in hook.save_best or ():
            if all_begin_so and not name.startswith(("auto", *prefixes)):
                raise UserError(
                    "default_hooks.checkpoint.save_best: expected auto, or a metric of val_evaluator, whose "
                    f"names begin with {' or '.join(prefixes)}, got {name}"
                )


def _nodes(node: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """All dicts in a nested value, with their dotted keys."""
    if isinstance(node, dict) and path:
        yield path, node
    pairs = (
        node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list | tuple) else ()
    )
    for name, value in pairs:
        yield from _nodes(value, f"{path}.{name}" if path else str(name))


def _registries(config: "Config") -> Iterator[Registry]:
    """The registries of the config's package (mmdet, mmseg), then mmengine's, which include mmcv's."""
    scope = config.get("default_scope") or "mmengine"
    import_module(f"{scope}.registry")
    roots = [entry for entry in vars(mmengine.registry).values() if isinstance(entry, Registry)]
    yield from (root.children[scope] for root in roots if scope in root.children)
    yield from roots


def _candidates(path: str, node: Mapping[str, Any], config: "Config") -> list[Callable[..., Any]]:
    """What may take a dict of the config as its arguments: the entries of all registries by its type."""
    kind = node.get("type")
    if kind is None:
        return [DataLoader] if path.endswith("_dataloader") else []
    if not isinstance(kind, str):
        return [kind]
    return [entry for registry in _registries(config) if (entry := registry.get(kind)) is not None]


def _keywords(called: Callable[..., Any]) -> set[str] | None:
    """The keywords that a class, with its bases, or a function declares; None if it takes any."""
    classes = inspect.getmro(called)[:-1] if inspect.isclass(called) else ()
    names: set[str] = set()
    for part in [vars(c)["__init__"] for c in classes if "__init__" in vars(c)] or [called]:
        parameters = inspect.signature(part).parameters.values()
        names |= {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            return names
    return None


def _instead_of_type(kind: str, config: "Config") -> str:
    package, dot, _ = kind.rpartition(".")
    if dot:
        return f"; check its spelling, and that {package} is installed"
    return _suggestion(kind, {name for registry in _registries(config) for name in registry.module_dict})


def _suggestion(name: str, known: set[str]) -> str:
    """The end of a message: known names that are similar to an unknown one."""
    near = get_close_matches(name, known, n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else "; check its spelling"
