"""Settings that others wrote, YAML and JSON: of bounded size and depth, their texts referring to nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ldm.errors import UserError
from ldm.foreign.paths import allowed

LARGEST = 1 << 25  # bytes of a file
MOST = 300_000  # entries; what an alias repeats counts as often as it stands
HIGHEST = 1_000_000  # number in the parameters of a model
DEEPEST = 64  # lists and mappings within one another
REFERENCE = "${"
_Safe = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_FLOAT = re.compile(
    r"""^(?: [-+]? (?: [0-9][0-9_]*\.[0-9_]* | \.[0-9][0-9_]* | [0-9][0-9_]*(?=[eE]) ) (?: [eE][-+]?[0-9]+ )?
    | [-+]?\.(?:inf|Inf|INF) | \.(?:nan|NaN|NAN) )$""",
    re.X,
)


_INT = re.compile(r"^[-+]?(?:0b[01_]+|0[0-7_]*|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$")
DIGITS = 1000  # of a whole number


class _Loader(_Safe):
    """Plain values; 1e-4 is a number, 2024-05-01 and 12:30 are texts, as in configs; a key that is there twice is an
    error."""

    def __init__(self, stream: str):
        super().__init__(stream)
        self.checked: set[yaml.Node] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if node not in self.checked:
            self.checked.add(node)
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if (key.tag, key.value) in seen:
                        raise yaml.constructor.ConstructorError(
                            None, None, f"the key {key.value} is there twice", key.start_mark
                        )
                    seen.add((key.tag, key.value))
        super().flatten_mapping(node)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = self.construct_scalar(node)
        if len(value) > DIGITS or ":" in value:  # the latter to base 60, which takes long
            raise yaml.constructor.ConstructorError(None, None, f"{value[:20]} is no whole number", node.start_mark)
        return super().construct_yaml_int(node)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag.rpartition(":")[2] not in ("timestamp", "float", "int")]
    for first, forms in _Safe.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):
    """Writes what `_Loader` reads back as it was: texts that look like numbers in quotes, nothing by aliases."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

    def ignore_aliases(self, data: object) -> bool:
        return True


for _kind in (float, int, str, dict, list):  # of their own kinds too, such as NumPy's float64
    _Dumper.add_multi_representer(_kind, lambda dumper, value, kind=_kind: dumper.represent_data(kind(value)))


def yaml_text(value: Mapping[str, Any]) -> str:
    """Plain settings as YAML, their keys in their order.

    >>> print(yaml_text({"steps": 3, "rate": 1e-4, "name": "1e-4", "sizes": [1, 2]}), end="")
    steps: 3
    rate: 0.0001
    name: '1e-4'
    sizes:
    - 1
    - 2
    """
    return yaml.dump(value, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)


def settings_text(path: Path, what: str = "the settings") -> str:
    """The text of a file of settings. UserError: no such file, too large, not UTF-8.

    >>> settings_text(Path("a.yaml"), "the config")
    Traceback (most recent call last):
    ldm.errors.UserError: cannot read the config a.yaml: there is no such file.
    """
    path = allowed(path)
    try:
        if not path.is_file():
            state = "it is no file" if path.exists() else "there is no such file"
            raise UserError(f"cannot read {what} {path}: {state}.")
        with path.open("rb") as stream:
            data = stream.read(min(LARGEST, path.stat().st_size) + 1)
        if len(data) > LARGEST:
            raise UserError(f"{path} has more than {LARGEST >> 20} MiB; no settings are so large. Is it another file?")
        return data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {what} {path}: it is not UTF-8 text ({error.reason}).") from error


def read_yaml(path: Path, what: str = "the settings") -> Any:
    """The content of a YAML file. UserError: unreadable, no YAML, a key twice, too many entries or nested too deeply.

    >>> _ = Path("a.yaml").write_text("scorer: {members: 3}")
    >>> read_yaml(Path("a.yaml"))
    {'scorer': {'members': 3}}
    """
    return parse_yaml(settings_text(path, what), f"{what} {path}")


def parse_yaml(text: str, source: object) -> Any:
    """The content of YAML text, whose references `${...}` are but text. source: what messages call it.

    >>> parse_yaml("[1, 2", "a.yaml")
    Traceback (most recent call last):
    ldm.errors.UserError: a.yaml is not valid YAML: while parsing a flow sequence ...
    """
    try:
        _check_yaml(text, source)
        return yaml.load(text, Loader=_Loader)
    except UserError:
        raise
    except Exception as error:  # of a date, a number or a tag that is none, constructors raise what they happen to
        raise UserError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from error


def _check_yaml(text: str, source: object) -> None:
    """UserError for YAML that would become too much, before anything is built: nested deeply, aliases that multiply."""
    known: dict[str, tuple[int, int]] = {}  # of anchors: entries and depth
    open_nodes: list[tuple[str | None, int, int]] = []  # anchor, entries before, deepest within
    entries = 0
    for event in yaml.parse(text, Loader=_Safe):
        size, height = 0, 0
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, entries, 0))
            entries += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before, height = open_nodes.pop()
            height += 1
            if anchor is not None:
                known[anchor] = (entries - before, height)
        elif isinstance(event, yaml.AliasEvent):
            size, height = known.get(event.anchor, (MOST, 0))  # one of a node that is not closed holds itself
        elif isinstance(event, yaml.ScalarEvent):
            size = 1 + len(event.value) // 100
            if event.anchor is not None:
                known[event.anchor] = (size, 0)
        entries += size
        if open_nodes:
            anchor, before, deepest = open_nodes[-1]
            open_nodes[-1] = (anchor, before, max(deepest, height))
        if len(open_nodes) + height > DEEPEST:
            raise _too_deep(source)
        if entries > MOST:
            raise _too_much(source)


def read_json(path: Path, what: str = "the settings") -> Any:
    """The content of a JSON file. UserError: unreadable, too large, not JSON, nested too deeply.

    >>> _ = Path("a.json").write_text('{"weight_map": {}}')
    >>> read_json(Path("a.json"))
    {'weight_map': {}}
    """
    return parse_json(settings_text(path, what), f"{what} {path}")


def parse_json(text: str, source: object) -> Any:
    """The content of JSON text. source: what messages call it.

    >>> parse_json("[" * 100_000, "a.json")
    Traceback (most recent call last):
    ldm.errors.UserError: a.json is nested too deeply to be read; no settings are. Is it another file?
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{source} is nested too deeply to be read; no settings are. Is it another file?") from None
    except ValueError as error:
        raise UserError(f"{source} is not valid JSON: {error}.") from error


def check_settings(value: Any, source: object, where: str = "") -> None:
    """UserError for settings of others that refer to anything, are too deep or too many; it names the key.

    References, `${oc.env:HOME}`, `${a.b}`, are for configs that the user writes: settings that came with a model, an
    encoder or a checkpoint hold their values themselves.

    Args:
        where: the key under which they stand.

    >>> check_settings({"metadata": {"licence": "${oc.env:TOKEN}"}}, "config.yaml")
    Traceback (most recent call last):
    ldm.errors.UserError: config.yaml: metadata.licence refers to something else by ${...}; settings that came with ...
    """
    for key, node in _within(value, source, where):
        if not (node is None or isinstance(node, (str, int, float, Mapping, list, tuple))):
            raise UserError(f"{source}: {key} is a {type(node).__name__}, which is no setting.")
        if isinstance(node, str) and any("\ud800" <= letter <= "\udfff" for letter in node):
            raise UserError(f"{source}: {key} is no text: a part of it is no letter; write it again.")
        if isinstance(node, str) and REFERENCE in node:
            raise UserError(
                f"{source}: {key} refers to something else by ${{...}}; settings that came with a model or from others "
                "read neither the environment nor files nor other keys: write the value itself there, if you trust it."
            )


def check_numbers(value: Any, source: object, where: str = "") -> None:
    """UserError for a number in the parameters of a model that no model has; it names the key. where: as above.

    >>> check_numbers({"num_res_blocks": 10**7}, "config.yaml", "model.params")
    Traceback (most recent call last):
    ldm.errors.UserError: config.yaml: model.params.num_res_blocks is 10000000; numbers of a model are up to 1000000.
    """
    for key, node in _within(value, source, where):
        if isinstance(node, (int, float)) and not -HIGHEST <= node <= HIGHEST:
            raise UserError(f"{source}: {key} is {str(node)[:20]}; numbers of a model are up to {HIGHEST}.")


def _within(value: Any, source: object, where: str) -> Iterator[tuple[str, Any]]:
    """Every key and entry of settings, by their whole keys. UserError: too deep, too many."""
    entries, left = 0, [(value, where, 0)]
    while left:
        node, key, depth = left.pop()
        entries += 1
        if depth > DEEPEST:
            raise _too_deep(source)
        if entries > MOST:
            raise _too_much(source)
        yield key, node
        if isinstance(node, Mapping):
            for name, child in node.items():
                inner = f"{key}.{name}" if key else f"{name}"
                left += [(name, inner, depth + 1), (child, inner, depth + 1)]
        elif isinstance(node, (list, tuple)):
            left += [(child, f"{key}.{index}", depth + 1) for index, child in enumerate(node)]


def _too_deep(source: object) -> UserError:
    return UserError(f"{source} is nested more than {DEEPEST} deep; no settings are. Is it another file?")


def _too_much(source: object) -> UserError:
    return UserError(
        f"{source} has more than {MOST} entries, those that aliases repeat among them; no settings have so many. Is it "
        "another file?"
    )
