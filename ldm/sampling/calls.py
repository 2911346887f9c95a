"""Calls of the Python face with arguments that a function does not take: told with the right call."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any, TypeVar

from ldm.errors import UserError, suggest

CARRIERS = {"sampler": "Sampler", "windows": "Windows", "inversion": "Inversion"}  # parameter -> class of its settings
Called = TypeVar("Called", bound=Callable[..., Any])


def explained(called: Called) -> Called:
    """A function or dataclass of `ldm` whose calls with arguments that it does not take are a UserError with the right
    call. Its signature stays what it is.

    >>> @explained
    ... def sample(model, count=None, sampler=None):
    ...     return count
    >>> sample(None, count=2), str(inspect.signature(sample))
    (2, '(model, count=None, sampler=None)')
    >>> sample(None, steps=20, seed=0)
    Traceback (most recent call last):
    ldm.errors.UserError: ldm.sample takes no steps=, seed=: give sampler=ldm.Sampler(steps=..., seed=...)
    """
    if isinstance(called, type):
        called.__init__ = _checked(called.__init__, called.__name__)
        return called
    return _checked(called, called.__name__)


def _checked(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: Any, **given: Any) -> Any:
        try:
            signature.bind(*args, **given)
        except TypeError as error:
            raise UserError(_told(f"ldm.{name}", signature, args, given, str(error))) from None
        return function(*args, **given)

    return checked


def _told(name: str, signature: inspect.Signature, args: tuple[Any, ...], given: Mapping[str, Any], error: str) -> str:
    taken = [each for each in signature.parameters if each != "self"]
    unknown = [each for each in given if each not in taken]
    if not unknown:
        if signature.parameters[taken[0]].kind is inspect.Parameter.KEYWORD_ONLY:
            return f"{name} takes its settings by name, as {name}({taken[0]}=...)"
        return f"{name}: {error}; it is called as {name}({', '.join(taken)})"
    head = f"{name} takes no {', '.join(f'{each}=' for each in unknown)}"
    homes = _homes(taken, args[0] if args else given.get("model"))
    calls: dict[str, list[str]] = {}
    for each in unknown:
        meant = _meant(each.rstrip("_"), [*taken, *homes])
        if meant not in homes:
            return head + suggest(each, taken)
        calls.setdefault(homes[meant], []).append(meant)
    return f"{head}: give {' and '.join(call.format(_values(call, own)) for call, own in calls.items())}"


def _meant(given: str, known: list[str]) -> str | None:
    """The known name that is given, that has it as a part, or that is like it; None where none is."""
    parts = sorted((name for name in known if given in name), key=len)
    return next(iter(parts or get_close_matches(given, known, n=1)), None)


def _values(call: str, names: list[str]) -> str:
    if call.startswith("conditions"):
        return ", ".join(f"'{name}': ..." for name in names)
    return ", ".join(f"{name}{'_' if name == 'class' else ''}=..." for name in names)


def _homes(taken: list[str], model: Any) -> dict[str, str]:
    """Where a function takes what is no parameter of it: name -> argument, with a place for names and values."""
    settings, conditions = import_module("ldm.sampling.sampler"), getattr(model, "cond_stage_model", None)
    homes = {}
    for parameter, carrier in CARRIERS.items():
        if parameter in taken or "model" not in taken:  # a carrier's own call
            call = f"{parameter}=ldm.{carrier}({{}})"
            fields = dataclasses.fields(getattr(settings, carrier))
            homes |= {each.name: call for each in fields if each.name not in taken}
    if conditions is not None:
        from ldm.conditioners.compose import keys_of

        keys = [*conditions.keys, *(["features"] if keys_of(conditions, "features") else [])]
        for parameter in ("cond", "target", "conditions"):
            call = "conditions={{{}}}" if parameter == "conditions" else f"{parameter}=model.condition({{}})"
            homes |= {key: call for key in keys if parameter in taken and key not in taken}
    return homes
