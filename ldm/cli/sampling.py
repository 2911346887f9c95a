"""Options of the carriers of settings, made from their fields: a setting has its name, choices and help there alone."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ldm.cli.options import choices
from ldm.requests.parse import parse_guidance, parse_interval
from ldm.requests.sampling import AskedSampler
from ldm.sampling.sampler import TASKS, Inversion, Sampler, Task, Windows

Command = TypeVar("Command", bound=Callable[..., None])
CARRIERS = {AskedSampler: Sampler, Windows: Windows, Inversion: Inversion}  # type of a parameter -> its fields
PANELS = {Sampler: "Sampling", Windows: "Canvas", Inversion: "Translation"}
READERS = {"scale": parse_guidance, "interval": parse_interval}
SIMPLE = {"int": int, "float": float, "str": str, "bool": bool}
GUIDES: dict[str, tuple[Any, Any, str, str]] = {  # parameter -> type, default, option, help
    "negative": (
        list[str] | None,
        None,
        "--negative-condition",
        "Condition to move away from: name=value, as class=N (repeat)",
    ),
    "guide": (Path | None, None, "--guide-model", "Folder of a smaller or less trained model to move away from"),
    "classifier": (Path | None, None, "--classifier", "Folder of a classifier of noisy images to be guided by"),
    "lora": (list[str] | None, None, "--lora", "Adapter (LoRA) of the network: path, or path=scale (repeat)"),
    "classifier_scale": (float, 1.0, "--classifier-scale", "Scale of the classifier's gradient"),
}


def settings(*tasks: Task, **defaults: str) -> Callable[[Command], Command]:
    """Give a command the options of each carrier that is the type of one of its parameters.

    tasks: of `sampler.TASKS`, whose defaults the help tells. defaults: of a setting, in words, where they are others.
    A parameter of type `AskedSampler` takes all of `Sampler`, and what guides; one of `Windows` or `Inversion` theirs.
    """

    def give(command: Command) -> Command:
        hints = typing.get_type_hints(command, include_extras=True)
        own = {
            name: each.replace(kind=each.KEYWORD_ONLY, annotation=hints[name])
            for name, each in inspect.signature(command).parameters.items()
        }
        carriers = {name: own.pop(name).annotation for name in [*own] if own[name].annotation in CARRIERS}
        parameters = [*own.values()]
        for kind in carriers.values():
            parameters += _options(CARRIERS[kind], (_told(tasks) if kind is AskedSampler else {}) | defaults)
            if kind is AskedSampler:
                parameters += [_option(name, *about, panel=PANELS[Sampler]) for name, about in GUIDES.items()]

        def run(**given: Any) -> None:
            carried = {}
            for name, kind in carriers.items():
                carrier = CARRIERS[kind]
                made = carrier(**{each.name: _read(each, given.pop(each.name)) for each in _fields(carrier)})
                if kind is AskedSampler:
                    guides = {guide: given.pop(guide) for guide in GUIDES}
                    lists = {name: tuple(guides[name] or ()) for name in ("negative", "lora")}
                    made = AskedSampler(made, **guides | lists)
                carried[name] = made
            command(**given, **carried)

        run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
        run.__signature__ = inspect.Signature(parameters)
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        return run

    return give


def _told(tasks: tuple[Task, ...]) -> dict[str, str]:
    """Defaults of a command's tasks in words."""
    told = {"guidance_scale": "2, or 1 of models that always had their condition"}
    for name in TASKS[tasks[0]]:
        values = dict.fromkeys(_in_words(TASKS[task][name]) for task in tasks)
        told[name] = " or ".join(values)
    return told


def _in_words(value: Any) -> str:
    return ",".join(f"{part:g}" for part in value) if isinstance(value, tuple) else str(value)


def _fields(carrier: type) -> list[dataclasses.Field[Any]]:
    return [each for each in dataclasses.fields(carrier) if each.metadata and each.metadata["kind"] != "none"]


def _options(carrier: type, told: Mapping[str, str]) -> list[inspect.Parameter]:
    parameters = []
    for each in _fields(carrier):
        about = each.metadata
        if about["kind"]:
            kind, optional = (list[str] if about["kind"] == "scale" else str), True
        else:
            kind, optional = SIMPLE[each.type.removesuffix(" | None")], each.type.endswith(" | None")
        default, words, limits = each.default, about["help"], {"min": about["low"], "max": about["high"]}
        if about["choices"]:
            kind = choices(each.name.title(), about["choices"])
            default, limits = default and kind(default), {"metavar": "NAME"}
            words = f"{words} ({', '.join(about['choices'])})"
        option = f"--{each.name.replace('_', '-')}"
        kind, shown = kind | None if optional else kind, told.get(each.name)
        parameters.append(_option(each.name, kind, default, option, words, PANELS[carrier], shown, **limits))
    return parameters


def _option(
    name: str, kind: Any, default: Any, option: str, help: str, panel: str, told: str | None = None, **limits: Any
) -> inspect.Parameter:
    shown = told if told is not None else default is not None and default is not False
    about = typer.Option(option, help=f"{help}.", rich_help_panel=panel, show_default=shown, **limits)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, about])


def _read(field: dataclasses.Field[Any], value: Any) -> Any:
    kind = field.metadata["kind"]
    if kind in READERS:
        return READERS[kind](value or [] if kind == "scale" else value)
    return value.value if isinstance(value, Enum) else value
