"""Finds mistakes in a config that mmengine ignores or reports by a traceback: options that nothing reads,
unknown types, unknown keywords. Messages name the key."""

import inspect
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import mmengine.registry
from mmengine.config import DictAction
from mmengine.evaluator import Evaluator
from mmengine.hooks import CheckpointHook
from mmengine.registry import Registry, build_from_cfg
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
    *("num_batch_per_epoch", "disable_subprocess_warning"),
}
NUMBER_OR_TEXT = "loss_scale"  # 512.0 or dynamic
READ_KEYS = {  # of dicts without a type, all keys that the Runner reads
    "auto_scale_lr": {"enable", "base_batch_size"},
    "env_cfg": {"cudnn_benchmark", "mp_cfg", "dist_cfg", "resource_limit"},
    "randomness": {*inspect.signature(Runner.set_randomness).parameters} - {"self"},
}
BUILDERS = {
    build_from_cfg.__code__: "cfg",
    Runner.build_dataloader.__code__: "dataloader",
    Runner.build_optim_wrapper.__code__: "optim_wrapper",
}
"""Code that builds a part of the config, and which of its arguments is that part."""

PACKAGES = ("mmcv", "mmdet", "mmengine", "mmseg", "numpy", "torch", "torchvision")
REFUSALS = (ValueError, TypeError, LookupError, AssertionError, ImportError)  # of values, by a library


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

    What takes them refuses unknown keywords when it is built, see `explained_by_config`. Some code ignores
    them, so a new key that is one letter off another one is refused here.

    Raises:
        UserError: a first part that nothing reads, a misspelt key, no such entry of a list, or text in place
            of a number.
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
            else:
                node = node if isinstance(node, Mapping) else {}
                known = READ_KEYS.get(path)
                if known and name not in known:
                    raise UserError(f"--cfg-options {key}: nothing reads {name}{_suggestion(name, known)}")
                meant = [other for other in node if _one_letter_off(name, other)]
                if meant and name not in node and not _may_be_new(name, node, path, config):
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


def _may_be_new(name: str, node: Mapping[str, Any], path: str, config: "Config") -> bool:
    """Whether a key can be meant: it has a number, is a keyword of its dict's type, or all are free there."""
    keywords = [_keywords(candidate) for candidate in _candidates(path, node, config)]
    is_known = any(name in known for known in keywords if known)
    return is_known or any(map(str.isdigit, name)) or path.endswith("custom_keys")


@contextmanager
def explained_by_config(config: "Config") -> Iterator[None]:
    """Context manager for building from a config: if that fails, look for the reason in the part that failed.

    Looking before would refuse configs that run, since some code reads a part in its own way.

    Raises:
        UserError: that part has an unknown type or keyword, or a library's own code refused a value of it.
            Other errors pass, and OSErrors always do.
    """
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        if found := _reasons(error, config):
            raise UserError("\n".join(found)) from error
        raise


def _reasons(error: Exception, config: "Config") -> list[str]:
    """Mistakes in the part of the config that was being built when an error was raised; else what a library
    said of it, if nothing but installed code was running."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    built = [number for number, frame in enumerate(frames) if frame.f_code in BUILDERS]
    parts = [frames[number].f_locals[BUILDERS[frames[number].f_code]] for number in reversed(built)]
    places = next(filter(None, (_places(part, config) for part in parts if isinstance(part, Mapping))), {})
    found = [text for path, node in places.items() for text in mistakes(node, path, config)]
    libraries = _library_folders()
    own_code = any(not f.f_code.co_filename.startswith(libraries) for n in built[:1] for f in frames[n:])
    if found or not places or own_code or not isinstance(error, REFUSALS):
        return found
    said = str(error.args[0] if error.args else "")  # str() of a KeyError adds quotes
    said = said or traceback.extract_tb(error.__traceback__)[-1].line  # of an assert without a message
    return [f"{' or '.join(places)}: {said} (FOCAL_TRACEBACK=1 shows where)"]


def _library_folders() -> tuple[str, ...]:
    """How file names of Python's own and OpenMMLab's code begin."""
    found = [find_spec(name) for name in PACKAGES]
    folders = [folder for spec in found if spec for folder in spec.submodule_search_locations or ()]
    return (sysconfig.get_path("stdlib"), "<frozen ", *folders)


def _places(part: Mapping[str, Any], config: "Config") -> dict[str, dict[str, Any]]:
    """The dicts of the config that became a part, by dotted key. Code may have added keys; where none has all
    its values in the part, those that have the keys alone."""
    options = {key: value for key, value in config.to_dict().items() if key in KNOWN_OPTIONS}
    alike = {
        path: node
        for path, node in _nodes(options, "")
        if node and node.get("type") == part.get("type") and node.keys() <= part.keys()
    }
    same = {
        path: node
        for path, node in alike.items()
        if all(str(part[key]) == str(value) for key, value in node.items())
    }
    return same or alike


def mistakes(node: Mapping[str, Any], path: str, config: "Config") -> list[str]:
    """A sentence for each type that is in no registry, and each keyword that nothing of its type takes, in a
    part of the config and the options `*_cfg` and `optimizer` in it, which are built in another way."""
    kind, candidates = node.get("type"), _candidates(path, node, config)
    found = []
    if isinstance(kind, str) and not candidates and not path.endswith(NOT_OF_A_REGISTRY):
        found.append(f"{path}.type: there is no {kind}{_instead_of_type(kind, config)}")
    keywords = [_keywords(candidate) for candidate in candidates]
    known = {name for names in keywords for name in names or ()}
    if candidates and None not in keywords:
        for name in sorted(node.keys() - known - TAKEN_OUT - {"type"}):
            found.append(f"{path}: {candidates[0].__name__} takes no {name}{_suggestion(name, known)}")
    for name, value in node.items():
        if name.endswith(("_cfg", "optimizer")) and isinstance(value, Mapping):
            found += mistakes(value, f"{path}.{name}", config)
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
        return [kind] if callable(kind) else []
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
