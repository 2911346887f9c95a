"""Pages made at every build: of each command with its options, of the classes that configs name, of defaults, of
encoders."""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from typer.models import ArgumentInfo

ROOT = Path(__file__).resolve().parent.parent
OUT = Path(__file__).resolve().parent / "reference"
WORDS = {int: "whole number", float: "number", str: "text", Path: "path", bool: "flag"}
ROOMS = {
    "Conditioners": "ldm.conditioners.",
    "Networks": "ldm.networks.",
    "First stages": "ldm.autoencoder.",
    "Data": "ldm.data.",
}
HEAD = "| option | value | default | what it does |\n|---|---|---|---|"


@dataclass(frozen=True)
class Option:
    """A row of a command's table."""

    panel: str
    names: str
    value: str
    default: str
    does: str

    @property
    def row(self) -> str:
        cells = (self.names, self.value, self.default, plain(self.does))
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def plain(text: str) -> str:
    """A help text as Markdown that shows it as it is."""
    return re.sub(r"([*<])(?=[^`]*(?:`[^`]*`[^`]*)*$)", r"\\\1", text)


def main() -> None:
    """Write docs/reference/ anew."""
    shutil.rmtree(OUT, ignore_errors=True)
    (OUT / "commands").mkdir(parents=True)
    groups: dict[str, list[tuple[str, str]]] = {}
    for group, program, page, text in [*histoldm_pages(), *script_pages()]:
        (OUT / "commands" / f"{page}.md").write_text(f"# {program}\n\n{text}\n", encoding="utf-8")
        first = text.partition("\n\n")[0].replace("\n", " ")
        groups.setdefault(group, []).append((f"[{program}](reference/commands/{page}.md)", first))
    parts = []
    for group, rows in groups.items():
        lines = "\n".join(f"| {link} | {about} |" for link, about in rows)
        parts.append(f"## {group}\n\n| command | what it does |\n|---|---|\n{lines}")
    (OUT / "commands.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    (OUT / "classes.md").write_text(class_page(), encoding="utf-8")
    (OUT / "defaults.md").write_text(default_table(), encoding="utf-8")
    (OUT / "encoders.md").write_text(encoder_tables(), encoding="utf-8")


def histoldm_pages() -> Iterator[tuple[str, str, str, str]]:
    """Group, program, name of the page and text of each command of `histoldm`."""
    from ldm.cli import app

    for each in app.registered_commands:
        name = each.name or each.callback.__name__.replace("_", "-")
        text = train_page() if name == "train" else command_page(each.callback, each.callback.__doc__)
        yield each.rich_help_panel, f"histoldm {name}", name, text


def script_pages() -> Iterator[tuple[str, str, str, str]]:
    """The same of the scripts that prepare data."""
    import data_prep

    for module in pkgutil.iter_modules(data_prep.__path__):
        script = getattr(importlib.import_module(f"data_prep.{module.name}"), "main", None)
        if script is not None:
            text = command_page(inspect.unwrap(script.command.callback), script.command.help)
            yield "Prepare data", script.program, module.name, text


def command_page(function: Callable[..., None], about: str) -> str:
    options = list(options_of(function))
    text = described(inspect.cleandoc(about))
    for panel in dict.fromkeys(option.panel for option in options):
        rows = "\n".join(option.row for option in options if option.panel == panel)
        text += f"\n\n## {panel}\n\n{HEAD}\n{rows}"
    return text


def described(text: str) -> str:
    """A help text with its examples as code."""
    about, _, examples = text.partition("Examples:" if "Examples:" in text else "Example:")
    if "\n    " in examples:
        code, _, rest = examples.strip("\n").partition("\n\n")
        code = textwrap.dedent(code)
    else:
        code = re.sub(r";\s+(?=histoldm )", "\n", " ".join(examples.split()))
        code, rest = re.sub(r";\s+([a-z]+ [a-z]+ [a-z]+: )", r"\n# \1", code), ""
    code = f"```bash\n{code.strip()}\n```" if code.strip() else ""
    return "\n\n".join(part for part in (plain(about.strip()), code, plain(rest)) if part)


def options_of(function: Callable[..., None]) -> Iterator[Option]:
    hints = typing.get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        kind, info = typing.get_args(hints[name])[:2]
        argument = isinstance(info, ArgumentInfo)
        words = "/".join(map(str, (info.default, *(info.param_decls or ()))))  # --yes/--no are two
        decls = [word for word in words.split("/") if word.startswith("-")]
        names = f"`{name}`" if argument else ", ".join(f"`{decl}`" for decl in decls)
        panel = info.rich_help_panel or ("Arguments" if argument else "Options")
        value, choices = value_of(kind, info)
        does = info.help.replace(f" ({', '.join(choices)})", "") if choices else info.help
        required = parameter.default in (inspect.Parameter.empty, ...)
        yield Option(panel, names, value, "**required**" if required else default_of(parameter.default, info), does)


def value_of(kind: Any, info: Any) -> tuple[str, list[str]]:
    """What an option takes, in words, and its choices."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    several = typing.get_origin(kind) is list
    kind = typing.get_args(kind)[0] if several else kind
    choices = [member.value for member in kind] if isinstance(kind, type) and issubclass(kind, Enum) else []
    single = typing.get_args(kind) or (kind,)  # a tuple of kinds, which follow each other
    words = ", ".join(f"`{choice}`" for choice in choices) if choices else " and ".join(WORDS[each] for each in single)
    if info.min is not None:
        words += f" from {info.min:g}" + (f" to {info.max:g}" if info.max is not None else "")
    return f"{words}; several" if several else words, choices


def default_of(value: object, info: Any) -> str:
    if isinstance(info.show_default, str):
        return plain(info.show_default)
    value = value.value if isinstance(value, Enum) else value
    return "" if value is False or value in (None, "", []) else f"`{value}`"


def train_page() -> str:
    """The options of training: its own, and the arguments of Lightning's Trainer."""
    from pytorch_lightning import Trainer

    from ldm.training.command import HISTOLDM, parser
    from ldm.training.run import NOT_IN_CONFIG

    own = parser(HISTOLDM)
    rows = [
        f"| {', '.join(f'`{name}`' for name in action.option_strings)} | {_argument(action)} | {_help(own, action)} |"
        for action in own._actions
        if not isinstance(action, argparse._HelpAction)
    ]
    arguments = [
        f"| `--{name}` | {'' if each.default is None else f'`{each.default}`'} |"
        for name, each in inspect.signature(Trainer.__init__).parameters.items()
        if name not in NOT_IN_CONFIG
    ]
    about = re.sub(r"(?m)^    (\S.*)\n    (?=    )    (.*)$", r"    # \1\n    \2", own.description)
    head = "| option | value | what it does |\n|---|---|---|"
    parts = [described(about), "## Options", "\n".join([head, *rows])]
    parts += ["## Arguments of Lightning's Trainer", "Each is a key under `lightning.trainer` of a config, too."]
    return "\n\n".join([*parts, "| option | default |\n|---|---|\n" + "\n".join(arguments)])


def _argument(action: argparse.Action) -> str:
    if action.nargs == "?":
        return "`true`, `false`"
    return f"`{action.metavar}`" + "; several" * (action.nargs == "*") if action.metavar else WORDS[action.type or str]


def _help(own: argparse.ArgumentParser, action: argparse.Action) -> str:
    said = own._get_formatter()._expand_help(action)
    return plain(f"{said[0].upper()}{said[1:]}.")


def class_page() -> str:
    """Every class that a shipped config names as `target`, and every conditioner, by package."""
    names = sorted({*targets(), *conditioners()})
    python = "`ldm.latent_diffusion.LatentDiffusion` is in the [Python reference](../api/python.md)."
    parts = ["# Classes of configs", f"What a `target:` names, with its `params`. {python}"]
    for title, packages in ROOMS.items():
        parts.append(f"## {title}")
        parts += [
            f"```{{eval-rst}}\n.. autoclass:: {name}\n   :exclude-members: __init__\n```"
            for name in names
            if name.startswith(packages) and _is_class(name)
        ]
    return "\n\n".join(parts) + "\n"


def _is_class(name: str) -> bool:
    module, _, own = name.rpartition(".")
    return inspect.isclass(getattr(importlib.import_module(module), own))


def targets() -> Iterator[str]:
    """The classes of this package that the shipped configs name."""
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        yield from _targets(yaml.safe_load(path.read_text(encoding="utf-8")))


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict) and str(node.get("target", "")).startswith("ldm."):
        yield node["target"]
    children: Iterable[Any] = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for child in children:
        yield from _targets(child)


def conditioners() -> Iterator[str]:
    import ldm.conditioners
    from ldm.conditioners.base import Conditioner

    for module in pkgutil.iter_modules(ldm.conditioners.__path__, "ldm.conditioners."):
        for name, each in vars(importlib.import_module(module.name)).items():
            if inspect.isclass(each) and issubclass(each, Conditioner) and each.__module__ == module.name:
                if each is not Conditioner and not name.startswith("_"):
                    yield f"{module.name}.{name}"


def default_table() -> str:
    """What a Sampler takes where nothing is said, by task."""
    from ldm.sampling.sampler import TASKS

    names = list(next(iter(TASKS.values())))
    rows = [f"| {task} | " + " | ".join(f"`{usual[name]}`" for name in names) + " |" for task, usual in TASKS.items()]
    return f"| task | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}\n" + "\n".join(rows) + "\n"


def encoder_tables() -> str:
    """What the registry says of published encoders: what they are, then where they come from and on what terms."""
    from ldm.encoders.registry import REGISTRY

    what = ["| encoder | network | values | patch tokens | pooling | tiles | input |\n|" + "---|" * 7]
    terms = [
        "| encoder | licence | gated | non-commercial | its file, in the folder of its name | from |\n|" + "---|" * 6
    ]
    for name, spec in sorted(REGISTRY.items()):
        source, _, where = spec.source.partition(" ")
        file = (
            f"`{spec.folder or spec.name}/{spec.file}`" if not spec.unloadable else f"not loadable: {spec.unloadable}"
        )
        yes = ["yes" if value else "" for value in (spec.gated, spec.non_commercial)]
        cells = [
            f"`{name}`",
            spec.licence,
            *yes,
            file,
            f"[{source.removeprefix('https://')}]({source}) {where}".strip(),
        ]
        terms.append(f"| {' | '.join(cells)} |")
        if spec.unloadable:
            continue
        tokens = f"{spec.tokens} x {spec.tokens}"
        scale = "any" if spec.mpp is None else f"{spec.tile_size} px at {spec.mpp:g} µm"
        cells = [f"`{name}`", spec.arch, str(spec.dim), tokens, pooling_in_words(spec), scale, input_in_words(spec)]
        what.append(f"| {' | '.join(cells)} |")
    return "\n".join(what) + "\n\n" + "\n".join(terms) + "\n"


def pooling_in_words(spec: Any) -> str:
    """How an encoder makes one feature of its tokens."""
    pooled = {
        "token": "class token",
        "avg": "mean",
        "token+avg": "class token and mean of patches",
        "grid": f"means of {spec.grid} x {spec.grid} parts",
        "attention": "attention of one query",
    }[spec.pooling]
    return pooled + ", projected" * bool(spec.head) + ", length 1" * spec.unit_length


def input_in_words(spec: Any) -> str:
    """How a tile becomes the network's input."""
    side = spec.resize or spec.input_size
    middle = f", middle {spec.input_size}" if side != spec.input_size else ""
    values = " ".join(f"{mean:.3g}±{std:.3g}" for mean, std in zip(spec.mean, spec.std))
    return f"{spec.interpolation} to {side} px{middle}; {values}"
