"""YAML configs: load and merge them, check them before any work starts, and build the objects that they name.

A *node* is a mapping `{target: "package.module.Class", params: {...}}`. A config is a tree of plain dicts, lists and
scalars; OmegaConf does the merging and interpolation and is not visible outside this file.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any, NotRequired, TypedDict

from ldm.errors import UserError, nearest, suggest
from ldm.files import write_text
from ldm.foreign.settings import check_settings, read_yaml, yaml_text

SHIPPED = Path(__file__).parent / "configs"  # the repository's configs/, or those of an installed package
ALLOWED = ("ldm.", "torch.optim.", "torch.nn.", "pytorch_lightning.callbacks.", "pytorch_lightning.loggers.")
BUILDERS = ("ldm.model_folder.load_first_stage",)  # functions that may be targets; all other targets are classes
_ALSO_ALLOWED: ContextVar[tuple[str, ...]] = ContextVar("also_allowed", default=())
_MODULES_ONLY: ContextVar[bool] = ContextVar("modules_only", default=False)
TOP_LEVEL = {"model", "data", "lightning", "name", "seed"}
LIGHTNING = {"trainer", "callbacks", "modelcheckpoint", "logger"}
MODEL_NODE = {"target", "params", "base_learning_rate", "scale_lr"}


class Node(TypedDict):
    """The part of a config from which one object is built, as `target(**params)`."""

    target: str
    params: NotRequired[dict[str, Any]]


def load_config(
    paths: Sequence[str | Path], overrides: Sequence[str] = (), defaults: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Merge YAML files and overrides into one config of plain containers. Mappings are merged, lists replaced.

    Args:
        paths: files, or names of shipped configs (see `shipped`); a later one wins over an earlier one.
        overrides: `key.path=value`, which win over the files; the value is read as YAML (`1e-4` is a float, `null` is
            None).
        defaults: what the files win over.
    Raises:
        UserError: a file is missing or unreadable or is not YAML; an override is malformed; an interpolation fails.

    >>> write_text("a.yaml", "model: {lr: 1.0, steps: 5}")
    >>> load_config(["a.yaml"], ["model.lr=1e-4"])
    {'model': {'lr': 0.0001, 'steps': 5}}
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    parts = [OmegaConf.create(_read(path)) for path in paths]
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key or key.startswith("-") or "" in key.split("."):
            raise UserError(
                f"'{override}' is not an override; write key.path=value, for example lightning.trainer.max_steps=9"
            )
        try:
            parts.append(OmegaConf.from_dotlist([override]))
        except Exception as error:  # the value is parsed as YAML, by whatever grammar it appears to have
            raise UserError(f"cannot read the override '{override}': {_one_line(error)}") from error
    try:
        return OmegaConf.to_container(OmegaConf.merge(defaults or {}, *parts), resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        files = ", ".join(str(path) for path in paths)
        raise UserError(f"cannot merge the configs {files}: {_one_line(error)}") from error


def foreign_config(path: str | Path) -> dict[str, Any]:
    """A YAML that others wrote as plain containers: the config of a model folder, the YAML of a published model.

    A file, or the name of a shipped config. What a user's own config may, refer to the environment and to other keys,
    it may not: every value stands in it.

    Raises:
        UserError: missing or unreadable, no YAML, too large or nested too deeply; a value that refers to another.

    >>> write_text("config.yaml", "metadata: {licence: '${oc.env:TOKEN}'}")
    >>> foreign_config("config.yaml")
    Traceback (most recent call last):
    ldm.errors.UserError: config.yaml: metadata.licence refers to something else by ${...}; settings that came with ...
    """
    content = _read(path)
    check_settings(content, path)
    return content


def shipped(path: str | Path) -> Path:
    """The path of a config: `path` where it is a file, else the shipped config of that name (`.yaml` may be left out).

    Where there is neither, `path` is returned as it is.

    >>> shipped("demo/ssl").name, shipped("configs/demo/tiny_clip.json").is_file(), str(shipped("mine.yaml"))
    ('ssl.yaml', True, 'mine.yaml')
    """
    path = Path(path)
    name = str(path).removeprefix("configs/")
    found = [p for p in (path, SHIPPED / name, SHIPPED / f"{name}.yaml") if p.is_file()]
    return found[0] if found else path


def _read(path: str | Path) -> dict[str, Any]:
    path = shipped(path)
    if not path.exists():
        names = sorted(str(p.relative_to(SHIPPED).with_suffix("")) for p in SHIPPED.glob("*/*.yaml"))
        near = nearest(str(path), [*names, *(f"{name}.yaml" for name in names), *map(str, path.parent.glob("*.y*ml"))])
        raise UserError(f"config '{path}' does not exist{near} Shipped configs: {', '.join(names)}.")
    content = read_yaml(path, "the config")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"config '{path}' must hold `key: value` pairs at its top level, not a list or a single value")
    return content


def save_config(cfg: Mapping[str, Any], path: str | Path) -> None:
    """Write a config as YAML. The file is complete or not there.

    >>> save_config({"name": "demo"}, "a.yaml")
    >>> Path("a.yaml").read_text()
    'name: demo\\n'
    """
    write_text(path, yaml_text(dict(cfg)))


def instantiate_from_config(node: Node | Mapping[str, Any], allow: Iterable[str] = (), **extra: Any) -> Any:
    """Build the object that a node names: `node["target"](**node["params"], **extra)`.

    Nodes nested in `params` are passed on as they are; the class builds them.

    Args:
        node: `{target, params}`.
        allow: prefixes of targets that are allowed beside those in ALLOWED.
        extra: parameters that the program sets and a config must not.
    Raises:
        UserError: this is not a node; its target does not exist or is not allowed; params are unknown, missing, or of
            a kind or value that it cannot be built with. What targets raise that `allow` permits comes through.

    >>> instantiate_from_config({"target": "torch.nn.Linear", "params": {"in_features": 8}}, out_features=4)
    Linear(in_features=8, out_features=4, bias=True)
    >>> instantiate_from_config({"target": "torch.nn.Linear", "params": {"in_features": "x", "out_features": 4}})
    Traceback (most recent call last):
    ldm.errors.UserError: torch.nn.Linear cannot be built with these params: TypeError: empty(): argument 'size' ...
    """
    where = "config" if not isinstance(node, Mapping) else str(node.get("target"))
    target, params = _parse_node(node, where, allow)
    if clash := sorted(set(params) & set(extra)):
        raise UserError(f"{where}: '{clash[0]}' is set by the program; remove it from params")
    check_params(target, {**params, **extra}, where)
    try:
        return target(**params, **extra)
    except (UserError, OSError):
        raise
    except Exception as error:  # a class raises whatever it stumbles over in params of the wrong kind
        if where.startswith(_trusted(allow)):  # somebody's own code, which needs its traceback
            raise
        reason = str(error).partition("\n")[0]
        raise UserError(f"{where} cannot be built with these params: {type(error).__name__}: {reason}") from error


def validate(cfg: Mapping[str, Any], allow: Iterable[str] = ()) -> None:
    """Check a training config before any work starts: its keys, and every node in it at any depth.

    A nested node may get some params from the class that builds it, so missing ones are found when that happens.

    Args:
        cfg: the merged config, with the keys in TOP_LEVEL.
        allow: prefixes of targets that are allowed beside those in ALLOWED.
    Raises:
        UserError: a key is unknown or missing, or a node is wrong; the message gives its whole path.

    >>> validate({"modle": {}, "data": {}})
    Traceback (most recent call last):
    ldm.errors.UserError: unknown key 'modle'; did you mean 'model'? Known: data, lightning, model, name, seed.
    """
    _check_keys(cfg, TOP_LEVEL, "")
    for key in ("model", "data"):
        if key not in cfg:
            raise UserError(f"the config has no `{key}: {{target, params}}`; add a --base file that has one")
    lightning = cfg.get("lightning") or {}
    _check_mapping(lightning, "lightning")
    _check_keys(lightning, LIGHTNING, "lightning.")
    for key in sorted(LIGHTNING):
        _check_mapping(lightning.get(key) or {}, f"lightning.{key}")
    _check_mapping(cfg["model"], "model")
    _check_keys(cfg["model"], MODEL_NODE, "model.")
    model = {key: value for key, value in cfg["model"].items() if key in ("target", "params")}
    for where, node in (("model", model), ("data", cfg["data"])):
        _parse_node(node, where, allow)
        _walk(node, where, allow)
    for name, node in (lightning.get("callbacks") or {}).items():
        if node is not None:  # `lightning.callbacks.image_logger=null` removes a default one
            _check_mapping(node, f"lightning.callbacks.{name}")
            _walk(node, f"lightning.callbacks.{name}", allow)
    _walk(lightning.get("logger") or {}, "lightning.logger", allow)


def _walk(value: object, where: str, allow: Iterable[str]) -> None:
    if isinstance(value, Mapping):
        if isinstance(value.get("target"), str):
            target, params = _parse_node(value, where, allow)
            check_params(target, params, f"{where}.params", missing=False)
        elif "params" in value:
            raise UserError(f"{where}: it has `params` but no `target` that takes them{suggest('target', value)}")
        for key, child in value.items():
            _walk(child, f"{where}.{key}", allow)
    elif isinstance(value, list):
        for index, child in enumerate(value):
            _walk(child, f"{where}.{index}", allow)


def _parse_node(node: object, where: str, allow: Iterable[str]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The class that a node names, and its params."""
    _check_mapping(node, where)
    _check_keys(node, {"target", "params"}, f"{where}.")
    if not isinstance(node.get("target"), str):
        raise UserError(f"{where}: expected {{target: module.Class, params: {{...}}}}, got {_short(dict(node))}")
    params = node.get("params") or {}
    _check_mapping(params, f"{where}.params")
    try:
        return get_obj_from_str(node["target"], allow), dict(params)
    except UserError as error:
        raise error if where == node["target"] else UserError(f"{where}.target: {error}") from error.__cause__


@contextmanager
def allowing(prefixes: Iterable[str]) -> Iterator[None]:
    """A context in which targets that begin with one of these prefixes are allowed too, at any depth of a node.

    >>> with allowing(["collections."]):
    ...     get_obj_from_str("collections.OrderedDict")
    <class 'collections.OrderedDict'>
    """
    token = _ALSO_ALLOWED.set((*_ALSO_ALLOWED.get(), *prefixes))
    try:
        yield
    finally:
        _ALSO_ALLOWED.reset(token)


def _trusted(allow: Iterable[str]) -> tuple[str, ...]:
    """Prefixes of targets outside of the package that the user allows."""
    return (*allow, *_ALSO_ALLOWED.get())


@contextmanager
def modules_only() -> Iterator[None]:
    """A context in which targets must be torch modules. Models are built in it, as their configs may come from anybody.

    >>> with modules_only():
    ...     get_obj_from_str("torch.optim.Adam")
    Traceback (most recent call last):
    ldm.errors.UserError: 'torch.optim.Adam' cannot be part of a model: it is not a torch.nn.Module
    """
    token = _MODULES_ONLY.set(True)
    try:
        yield
    finally:
        _MODULES_ONLY.reset(token)


def get_obj_from_str(target: str, allow: Iterable[str] = ()) -> Callable[..., Any]:
    """The class, or the function among BUILDERS, that a dotted name stands for.

    Nothing outside the allowed prefixes (ALLOWED, `allow` and `allowing`) is imported. Targets that `allow` or
    `allowing` permits may be functions too.

    Raises:
        UserError: the name is not allowed, does not exist, or is not a class.

    >>> get_obj_from_str("torch.nn.Linear")
    <class 'torch.nn.modules.linear.Linear'>
    """
    trusted = _trusted(allow)
    allowed = (*ALLOWED, *trusted)
    if not target.startswith(allowed):
        raise UserError(
            f"'{target}' is not allowed; a target must start with one of {', '.join(allowed)}. If you trust the code "
            "of the model, pass the beginning of its name to --allow-target, an option of commands that load models."
        )
    parts = target.split(".")
    if not all(part.isidentifier() for part in parts):
        raise UserError(f"'{target}' is not a dotted name such as ldm.module.Class")
    found: Any = _import(parts[0])
    if found is None:
        raise UserError(f"'{target}' does not exist: there is no package '{parts[0]}'")
    for index, part in enumerate(parts[1:], start=1):
        name = ".".join(parts[:index])
        child = getattr(found, part, None)
        if child is None and isinstance(found, ModuleType) and hasattr(found, "__path__"):
            child = _import(f"{name}.{part}")
        if child is None:
            kind = "package" if hasattr(found, "__path__") else "module" if isinstance(found, ModuleType) else "class"
            raise UserError(f"'{target}' does not exist: {kind} '{name}' has no '{part}'{suggest(part, _names(found))}")
        found = child
    home = f"{getattr(found, '__module__', None)}."
    if not callable(found) or not home.startswith(allowed):  # what a module imports (`ldm.files.os.system`) stays out
        raise UserError(f"'{target}' is not a class or function of {', '.join(allowed)}")
    if target not in BUILDERS and not target.startswith(trusted):
        if not isinstance(found, type):
            raise UserError(f"'{target}' is a function; a target must be a class")
        if _MODULES_ONLY.get() and not _is_module(found):
            raise UserError(f"'{target}' cannot be part of a model: it is not a torch.nn.Module")
    return found


def _is_module(kind: type) -> bool:
    from torch import nn

    return issubclass(kind, nn.Module)


def _import(name: str) -> ModuleType | None:
    """Import a module; None if it does not exist. UserError if it imports a package that is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            return None
        raise UserError(f"'{name}' needs the package '{error.name}', which is not installed") from error


def _names(found: ModuleType | type) -> list[str]:
    """The public names in a package, module or class."""
    if hasattr(found, "__path__"):
        names = {module.name for module in pkgutil.iter_modules(found.__path__)}
        names |= {name for name in getattr(found, "__all__", ()) if callable(getattr(found, name, None))}
        return sorted(name for name in names if not name.startswith("_"))
    own = found.__name__ if isinstance(found, ModuleType) else found.__module__
    return [n for n, o in vars(found).items() if not n.startswith("_") and getattr(o, "__module__", None) == own]


def check_params(target: Callable[..., Any], params: Mapping[str, Any], where: str, missing: bool = True) -> None:
    """Check the parameters of a call `target(**params)` without making it.

    Args:
        target: class or function. The `**keywords` of a class are those that the next class of its MRO takes.
        params: its keyword arguments.
        where: name of the node in messages.
        missing: whether parameters without a default must be there.
    Raises:
        UserError: an unknown parameter, or a missing one.

    >>> check_params(Path.read_text, {"encodng": "utf-8"}, "here", missing=False)
    Traceback (most recent call last):
    ldm.errors.UserError: unknown key 'here.encodng' of Path.read_text; did you mean 'encoding'? Known: encoding, ...
    """
    named, more = _named_parameters(target)
    needed = [name for name, p in named.items() if p.default is p.empty and name not in params]
    bases = iter(target.__mro__[1:] if isinstance(target, type) else ())
    while more and (base := next(bases, None)):  # **keywords are for the next __init__
        if "__init__" in vars(base):
            inherited, more = _named_parameters(MethodType(base.__init__, base))
            named = inherited | named
    if not more:
        _check_keys(params, named, f"{where}.", of=f" of {target.__qualname__}")
    if missing and needed:
        raise UserError(f"{where}: {target.__qualname__} needs {', '.join(repr(name) for name in needed)}")


def _named_parameters(target: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """What `target` takes by name, and whether it takes any other name too."""
    known = inspect.signature(target).parameters.values()
    named = {p.name: p for p in known if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return named, any(p.kind is p.VAR_KEYWORD for p in known)


def _check_keys(given: Mapping[str, Any], known: Iterable[str], where: str, of: str = "") -> None:
    for key in given:
        if key not in known:
            raise UserError(f"unknown key '{where}{key}'{of}{suggest(key, known)}")


def _check_mapping(value: object, where: str) -> None:
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: expected `key: value` pairs, got {_short(value)}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
