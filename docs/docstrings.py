"""Docstrings, which are written for people, as reStructuredText: a table of the parameters, what is raised, examples.

What a docstring says of a parameter is found wherever it says it: under Args or Attributes, several in one line
(`steps: of the solver. solver: one of SOLVERS`), or in a paragraph that begins with the parameter's name. Of a carrier
of settings, bounds and choices come from its fields.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

SECTION = re.compile(r"(Args|Attributes|Raises):$")
OTHER_SECTION = re.compile(r"(Returns|Yields):$")
LITERAL = re.compile(r"(`[^`]+`)")
ENTRY = re.compile(r"(?:(?<=^)|(?<=[.;)] ))([A-Za-z_]\w*(?:, \w+)*): ")


def plain_to_rest(app, what, name, obj, options, lines):
    """Handler of `autodoc-process-docstring`."""
    lines[:] = rendered(parse(lines, parameters(obj)), obj)


def parameters(obj: object) -> dict[str, str]:
    """The default of each parameter, as text; of a dataclass, of each field."""
    try:
        signature = inspect.signature(obj)
    except (TypeError, ValueError):
        return {}
    return {each.name: _default(each) for each in signature.parameters.values() if each.name != "self"}


def _default(parameter: inspect.Parameter) -> str:
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return ""
    if parameter.default is parameter.empty:
        return "required"
    return f"``{getattr(parameter.default, '__name__', None) or repr(parameter.default)}``"


@dataclass
class Part:
    """A paragraph, or a block of code that stays as it is."""

    text: list[str]
    kind: str = "prose"  # or code, example

    def lines(self) -> list[str]:
        if self.kind == "code":
            return ["::", "", *(f"    {line}" for line in self.text), ""]
        return [*(self.text if self.kind == "example" else map(escaped, self.text)), ""]


@dataclass
class Said:
    """What a docstring says. told: names of parameters -> text; raises: kind of error -> text."""

    parts: list[Part] = field(default_factory=list)
    told: dict[str, str] = field(default_factory=dict)
    raises: list[tuple[str, str]] = field(default_factory=list)

    def tell(self, text: str, names: Iterable[str]) -> str:
        """Take the parameters and errors out of a text; what is left."""
        found = [match for match in ENTRY.finditer(text) if self._known(match[1], names)]
        if not found:
            return text
        for match, end in pairwise([*found, None]):
            said = text[match.end() : end.start() if end else None].strip()
            if match[1].endswith("Error"):
                self.raises.append((match[1], said))
            else:
                self.told[match[1]] = said
        return text[: found[0].start()].strip()

    @staticmethod
    def _known(words: str, names: Iterable[str]) -> bool:
        return words.endswith("Error") or all(word in names for word in words.split(", "))


def parse(lines: list[str], names: Iterable[str]) -> Said:
    said = Said()
    for block in blocks(lines):
        head = block[0].strip()
        if SECTION.match(head):
            for entry in entries(block[1:]):
                if left := said.tell(entry, names):
                    said.parts.append(Part([left]))
        elif OTHER_SECTION.match(head):
            said.parts.append(Part([f"**{head[:-1]}** " + " ".join(line.strip() for line in block[1:])]))
        elif head.startswith(">>>"):
            said.parts.append(Part(block, "example"))
        elif block[0].startswith("    "):
            said.parts.append(Part([line[4:] for line in block], "code"))
        elif head.startswith("- "):
            said.parts.append(Part(block))
        elif left := said.tell(" ".join(line.strip() for line in block), names):
            said.parts.append(Part([left]))
    return said


def blocks(lines: list[str]) -> Iterator[list[str]]:
    """Paragraphs, sections with what is indented below them, indented code with its empty lines, examples."""
    block: list[str] = []
    for line in [*lines, ""]:
        head = block[0] if block else ""
        section = bool(SECTION.match(head) or OTHER_SECTION.match(head))
        starts = SECTION.match(line) or OTHER_SECTION.match(line) or (section and line[:1].strip())
        code = head.startswith("    ") and not head.strip().startswith(">>>")
        if block and (starts or (not line.strip() and not code) or (code and line[:1].strip())):
            yield _stripped(block)
            block = []
        if line.strip() or (code and block):
            block.append(line)
    if block:
        yield _stripped(block)


def _stripped(block: list[str]) -> list[str]:
    while block and not block[-1].strip():
        block.pop()
    return block


def entries(lines: list[str]) -> Iterator[str]:
    """Each entry of a section on one line: what is indented further belongs to the one before."""
    depth = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    entry: list[str] = []
    for line in lines:
        if entry and len(line) - len(line.lstrip()) <= depth:
            yield " ".join(entry)
            entry = []
        entry.append(line.strip())
    if entry:
        yield " ".join(entry)


def escaped(text: str) -> str:
    """`*`, `|` and a trailing `_` mean themselves in a docstring."""
    parts = LITERAL.split(text)
    parts[::2] = [re.sub(r"([*|])", r"\\\1", re.sub(r"(\w)_(?!\w)", r"\1\\_", part)) for part in parts[::2]]
    return "".join(parts)


def rendered(said: Said, obj: object) -> list[str]:
    """Prose, the table of parameters, errors; examples last."""
    out = [line for part in said.parts if part.kind != "example" for line in part.lines()]
    if said.told:
        out += table(said.told, parameters(obj), _metadata(obj))
    for kind, text in said.raises:
        out += [f"**Raises** `{kind}`: {escaped(text)}", ""]
    return out + [line for part in said.parts if part.kind == "example" for line in part.lines()]


def _metadata(obj: object) -> dict[str, dict]:
    fields = dataclasses.fields(obj) if dataclasses.is_dataclass(obj) else ()
    return {each.name: dict(each.metadata) for each in fields}


def table(told: dict[str, str], defaults: dict[str, str], metadata: dict[str, dict]) -> list[str]:
    """A row for each parameter, or for several that one text tells of."""
    out = [".. list-table::", "   :header-rows: 1", "   :widths: 22 16 62", "   :class: parameters", ""]
    out += ["   * - parameter", "     - default", "     - what it is"]
    for names, text in told.items():
        each = names.split(", ")
        values = dict.fromkeys(defaults.get(name, "") for name in each)
        about = metadata.get(each[0], {})
        text = max(text, about.get("help", ""), key=len)
        out += [f"   * - {', '.join(f'``{name}``' for name in each)}"]
        out += [f"     - {', '.join(filter(None, values)) or '—'}"]
        out += [f"     - {escaped(_sentence(text))}{_bounds(about)}"]
    return [*out, ""]


def _sentence(text: str) -> str:
    text = text.rstrip(" ;,")
    text = text[:1].upper() + text[1:] if re.match(r"[a-z]+[ ,]", text) else text
    return text if text.endswith((".", ":")) else f"{text}."


def _bounds(about: dict) -> str:
    if about.get("choices"):
        return " One of " + ", ".join(f"``{choice}``" for choice in about["choices"]) + "."
    low, high = about.get("low"), about.get("high")
    if low is None:
        return ""
    return f" From {low:g}" + ("." if high is None else f" to {high:g}.")
