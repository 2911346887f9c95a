"""How a command line runs, `histoldm` and every script alike: what a user gets wrong, Ctrl-C and a full disk are one
message and an exit code, never a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from inspect import cleandoc
from typing import NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from ldm.errors import run_command

USAGE_ERROR = typer.BadParameter.__base__  # typer may bring a click of its own


def call(command: TyperCommand | TyperGroup, program: str, argv: Sequence[str] | None = None) -> None:
    """Run a command with the words that follow its name, those of this process by default.

    Raises:
        SystemExit: 0 after --help, 2 after a usage error, which has been printed.
        UserError, KeyboardInterrupt: what the command itself raises comes through.
    """
    try:
        with command.make_context(program, list(sys.argv[1:] if argv is None else argv)) as context:
            command.invoke(context)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except USAGE_ERROR as error:
        error.show()
        sys.exit(error.exit_code)


class ScriptCommand(TyperCommand):
    """A command whose list options take several words: `--slides a b c` is `--slides a --slides b --slides c`."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        lists = {name for param in self.params if getattr(param, "multiple", False) for name in param.opts}
        if any(param.param_type_name == "argument" for param in self.params):
            lists = set()  # a word there may be an argument
        return super().parse_args(ctx, list(_repeated(args, lists)))


def _repeated(words: Sequence[str], lists: set[str]) -> Iterator[str]:
    """`words` with the name of a list option before each of its values."""
    option, valued = "", False
    for word in words:
        if word.startswith("-"):
            name, equals, _ = word.partition("=")
            option, valued = name if name in lists else "", bool(equals)
        elif option:
            if valued:
                yield option
            valued = True
        yield word


def unwrapped(text: str) -> str:
    """A docstring with each paragraph on one line, for a terminal of any width; indented blocks stay as they are."""
    paragraphs = cleandoc(text).split("\n\n")
    return "\n\n".join(part if part.startswith(" ") else part.replace("\n", " ") for part in paragraphs)


class Script:
    """A command line of its own, as `python -m data_prep.tile_slides`. `script` makes one of a function.

    Called with a list of words it runs them and raises what goes wrong, as in other people's Python; `run` is for the
    end of the module: it takes the words of this process and exits with its code.

    Attributes:
        program: how it is called. command: its options, for help and documentation.
    """

    def __init__(self, function: Callable[..., None], program: str, about: str, epilog: str | None = None):
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command(cls=ScriptCommand, help=unwrapped(about), epilog=epilog)(function)
        self.program = program
        self.command = typer.main.get_command(app)

    def __call__(self, argv: Sequence[str] | None = None) -> None:
        call(self.command, self.program, argv)

    def run(self) -> NoReturn:
        sys.exit(run_command(self))


def script(module: str, about: str, epilog: str | None = None) -> Callable[[Callable[..., None]], Script]:
    """Decorator: the function, whose parameters are options, becomes the command line `python -m module`.

    Args:
        about: what its help says, the module's docstring. epilog: what the help ends with.

    >>> @script("greet", "Greet somebody.")
    ... def main(name: str) -> None:
    ...     print(f"hello {name}")
    >>> main(["you"])
    hello you
    """
    return lambda function: Script(function, f"python -m {module}", about, epilog)
