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
from mmengine.registry import Registry
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from utils import UserError, user_input

if TYPE_CHECKING:
    from mmengine.config import Config

READ = {  # options that are not arguments of `Runner`, but read by it or by other code
    *("activation_checkpointing", "compile", "cudnn_benchmark", "efficient_conv_bn_eval"),
    *("find_unused_parameters", "model_wrapper_cfg", "sync_bn"),
    *("test_pipeline", "tta_model", "tta_pipeline"),
}
READERS = READ | {*inspect.signature(Runner).parameters}


class Options(DictAction):
    """The values of --cfg-options; refuses those that are not KEY=VALUE."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        for value in values:
            if not value.partition("=")[0] or "=" not in value:
                raise UserError(
                    f"{option_string}: expected KEY=VALUE, without spaces around =, got {value!r}"
                )
        with user_input(option_string or ""):
            super().__call__(parser, namespace, values, option_string)


def check_options(config: "Config", options: Mapping[str, Any]) -> None:
    """Check --cfg-options, a mapping from keys to values, against the config that they will change.

    Raises:
        UserError: a key that nothing reads.
    """
    for key in options:
        first, *rest = key.split(".")
        if first not in READERS:
            known = (
                f"only the config file itself reads {first}; set the keys where it is used, such as "
                "train_dataloader.dataset.data_root"
                if first in config
                else f"the config has no {first}{_instead(first, {*READERS, *config})}"
            )
            raise UserError(f"--cfg-options {key}: {known}")
        node, path = config.get(first), first
        for name in rest:
            if isinstance(node, list | tuple):
                if not name.isdecimal() or int(name) >= len(node):
                    raise UserError(f"--cfg-options {key}: {path} is a list of {len(node)}, got {name}")
                node = node[int(name)]
            elif isinstance(node, Mapping):
                kind = options.get(f"{path}.type", node.get("type"))
                names = _keywords(_called(path, {"type": kind}, config))
                if name not in node and names and name not in names:
                    raise UserError(f"--cfg-options {key}: {path} takes no {name}{_instead(name, names)}")
                node = node.get(name)
            else:
                break
            path = f"{path}.{name}"


@contextmanager
def explained(config: "Config") -> Iterator[None]:
    """Context manager for building from a config: explain errors that come from its types or keywords.

    Raises:
        UserError: the config has an unknown type or keyword that the error mentions. Other errors pass.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        for words, mistake in mistakes(config):
            if any(word in str(error) for word in words):
                raise UserError(mistake) from error
        raise


def mistakes(config: "Config") -> Iterator[tuple[list[str], str]]:
    """Unknown types and keywords of a config: for each, the words by which to recognise an error that it
    causes, and a message."""
    used = {key: value for key, value in config.to_dict().items() if key in READERS}
    for path, node in _nodes(used, ""):
        kind, called = node.get("type"), _called(path, node, config)
        if isinstance(kind, str) and called is None:
            known = {name for registry in _registries(config) for name in registry.module_dict}
            yield [kind, "None"], f"{path}.type: there is no {kind}{_instead(kind, known)}"
        names = _keywords(called)
        for name in node.keys() - names - {"type", "_scope_"} if names else ():
            yield [name], f"{path}: {kind or 'a loader'} takes no {name}{_instead(name, names)}"


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


def _called(path: str, node: Mapping[str, Any], config: "Config") -> Callable[..., Any] | None:
    """The class or function whose arguments a dict of the config holds; None if unknown."""
    kind = node.get("type")
    if kind is None:
        return DataLoader if path.endswith("_dataloader") else None
    if not isinstance(kind, str):
        return kind
    found = (registry.get(kind) for registry in _registries(config))
    return next(
        (entry for entry in found if entry is not None), getattr(import_module("mmcv.ops"), kind, None)
    )


def _keywords(called: Callable[..., Any] | None) -> set[str]:
    """The keywords that a class or function takes; empty if unknown or if it takes any."""
    names = {
        "_delete_",
        "constructor",
        "convert_to_iter_based",
        "paramwise_cfg",
        "requires_grad",
    }  # not passed to it
    classes = inspect.getmro(called)[:-1] if inspect.isclass(called) else ()
    for part in [vars(c)["__init__"] for c in classes if "__init__" in vars(c)] or [called] * callable(
        called
    ):
        parameters = inspect.signature(part).parameters.values()
        names |= {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            return names
    return set()


def _instead(name: str, known: set[str]) -> str:
    """The end of a message: known names that are similar to an unknown one."""
    near = get_close_matches(name, known, n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else "; check its spelling"
