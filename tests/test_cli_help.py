"""Help shows an example and, at 80 columns, every option whole, for all commands; that of `histoldm` comes at once."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import typer.main
from scripts import MODULES, ROOT, commands_in, examples_of, script_of, words_after

from ldm.cli import app

HEAVY = ("torch", "pandas", "zarr", "numpy", "PIL", "openslide", "pytorch_lightning")
SECONDS = 1.0  # of processor time: other work on the machine makes no command slow
ASK = """
import io, json, sys, time
from contextlib import redirect_stdout
from ldm.cli import app
told = {}
for words in json.loads(sys.argv[1]):
    start = 0 if not told else time.process_time()
    with redirect_stdout(io.StringIO()) as text:
        app([*words, "--help"], standalone_mode=False, prog_name="histoldm")
    loaded = sorted(set(json.loads(sys.argv[2])) & set(sys.modules))
    told[" ".join(words)] = {"text": text.getvalue(), "loaded": loaded, "seconds": time.process_time() - start}
print(json.dumps(told))
"""


def leaves(command, words: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command line that does something, down through the groups."""
    inner = getattr(command, "commands", None)
    return [words] if inner is None else [leaf for name in inner for leaf in leaves(inner[name], (*words, name))]


COMMANDS = [(), *leaves(typer.main.get_command(app))]


def ask(commands: list[tuple[str, ...]]) -> dict[str, dict]:
    """The help of commands in a fresh Python, the first from its start."""
    call = [sys.executable, "-c", ASK, json.dumps(commands), json.dumps(HEAVY)]
    return json.loads(subprocess.run(call, capture_output=True, text=True, check=True).stdout)


@pytest.fixture(scope="module")
def told() -> dict[str, dict]:
    return ask(COMMANDS)


def test_the_commands_are_found():
    assert {("sample",), ("large-image",), ("view",), ("doctor",), ("convert",)} <= set(COMMANDS)


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words) or "histoldm")
def test_help_loads_nothing_heavy_and_shows_an_example(told, words):
    said = told[" ".join(words)]
    assert said["loaded"] == []
    assert "usage: histoldm" in said["text"].lower()
    assert "Example" in said["text"]


@pytest.mark.parametrize("words", [words for words in COMMANDS if words not in ((), ("train",))], ids=" ".join)
def test_examples_of_a_command_stand_on_lines_of_their_own_and_name_its_options(told, words):
    (name,) = words
    command = typer.main.get_command(app).commands[name]
    block = command.help.partition("\nExample")[2].partition("\n\n")[2].partition("\n\n")[0]
    examples = words_after(block, f"histoldm {name}")
    assert examples
    for given in examples:
        command.make_context(name, given)
    shown = [line.strip() for line in told[name]["text"].splitlines()]
    assert [line for line in block.splitlines() if line.strip() not in shown] == []


def test_help_is_quick():
    quickest = min(ask([("large-image",)])["large-image"]["seconds"] for _ in range(3))
    assert quickest < SECONDS


def names_of(command: typer.core.TyperCommand) -> list[str]:
    """Names of all options of a command, their negative forms too."""
    return [name for param in command.params for name in (*param.opts, *param.secondary_opts) if name.startswith("-")]


def shows(text: str, name: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text) is not None


@pytest.mark.parametrize("module", MODULES)
def test_help_of_a_script_shows_its_options_whole_and_an_example(module, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        script_of(module)(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    lines = [line.strip() for line in text.splitlines()]
    assert f"Usage: python -m {module} [OPTIONS]" in text
    assert max(map(len, text.splitlines())) <= 80
    assert [name for name in names_of(script_of(module).command) if not shows(text, name)] == []
    block = script_of(module).command.help.partition("\nExample")[2].partition("\n\n")[2]
    assert block.strip().startswith(f"python -m {module}")
    assert [line for line in block.splitlines() if line.strip() not in lines] == []  # none is wrapped


def test_help_of_the_scripts_that_prepare_data_does_not_wait_for_torch():
    names = [module for module in MODULES if module.startswith("data_prep.")]
    ask = f"import sys, importlib\nfor name in {names}: importlib.import_module(name)\nprint('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert len(names) == 15
    assert said == "False\n"


@pytest.mark.parametrize("module", MODULES)
def test_each_option_of_a_script_is_told_in_a_sentence_and_stands_in_a_panel(module):
    for param in script_of(module).command.params:
        if param.param_type_name == "option":
            assert re.fullmatch(r"[A-Z].{15,}\.", param.help), param.opts
            assert param.rich_help_panel, param.opts
            assert "height,width" not in param.help


@pytest.mark.parametrize("module", MODULES)
def test_examples_of_a_script_name_its_options(module):
    assert examples_of(module)
    for words in examples_of(module):
        script_of(module).command.make_context(module, words)


PLACES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "configs/**/*.yaml", "data/**/*.md", "notebooks/*.ipynb")
    for path in ROOT.glob(pattern)
    if not path.is_relative_to(ROOT / "docs" / "_build")
)


def test_commands_in_documents_and_configs_name_options_that_are_there():
    seen = set()
    for path in PLACES:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".ipynb":
            text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
        for module in MODULES:
            for words in commands_in(text, module):
                if any(word.startswith("--") and word != "--help" for word in words):
                    script_of(module).command.make_context(f"{path.name}: python -m {module}", words)
                    seen.add((path.relative_to(ROOT).parts[0], module))
    assert {place for place, _ in seen} == {"README.md", "docs", "configs", "data", "notebooks"}
    assert len({module for _, module in seen}) > 10


def test_main_shows_its_options_whole_and_an_example():
    call = [sys.executable, str(ROOT / "main.py"), "--help"]
    text = subprocess.run(call, capture_output=True, text=True, check=True, env={"COLUMNS": "80"}).stdout
    assert "Example" in text
    for name in ("--train", "--base", "--resume", "--name", "--postfix", "--logdir", "--seed", "--gpus", "--scale_lr"):
        assert shows(text, name)
