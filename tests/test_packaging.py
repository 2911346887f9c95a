"""What a newcomer installs and types: the dependency files agree, and the README's commands are there."""

from __future__ import annotations

import importlib.util
import inspect
import re
import shlex
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pytorch_lightning import Trainer
from typer.main import get_command

from ldm.cli import app

ROOT = Path(__file__).resolve().parent.parent
FREE = {"torch", "torchvision"}  # their build depends on the machine
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements() -> list[Requirement]:
    extras = project()["optional-dependencies"]
    return [Requirement(line) for line in [*project()["dependencies"], *extras["dev"]]]


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def readme_commands() -> list[str]:
    """Command lines of the README's bash blocks, continued lines joined, comments left out."""
    lines = "\n".join(BLOCKS).replace("\\\n", " ").splitlines()
    return [command for line in lines if (command := line.split(" #")[0].strip()) and not command.startswith("#")]


def test_every_dependency_has_a_tested_version_within_its_range():
    pins = constraints()
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        if name in FREE:
            assert name not in pins
        else:
            assert pins[name] in requirement.specifier, f"{name} {pins[name]} is outside {requirement.specifier}"


def test_the_compromised_lightning_releases_are_excluded():
    (lightning,) = [r for r in requirements() if r.name == "pytorch-lightning"]
    assert "2.6.2" not in lightning.specifier
    assert "2.6.3" not in lightning.specifier
    assert "2.6.1" in lightning.specifier


def test_conda_installs_this_project_under_the_constraints():
    environment = yaml.safe_load((ROOT / "environment.yaml").read_text())
    assert environment["channels"] == ["conda-forge"]
    *conda, pip = environment["dependencies"]
    (python,) = [Requirement(d.replace("=", "==")) for d in conda if d.startswith("python")]
    (version,) = [clause.version for clause in python.specifier]
    assert tuple(map(int, version.split("."))) >= (3, 11)
    assert "pip" in conda
    assert pip == {"pip": ["--constraint constraints.txt", "--editable .[dev]"]}


def test_make_and_conda_install_the_same():
    command = ["make", "-n", "--always-make", "install"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (made,) = [shlex.split(line) for line in done.stdout.splitlines() if "pip install" in line]
    asked = set(made[made.index("install") + 1 :]) - {"--quiet", "--disable-pip-version-check"}
    environment = yaml.safe_load((ROOT / "environment.yaml").read_text())
    listed = environment["dependencies"][-1]["pip"]  # as conda hands them to pip
    assert asked == {word for line in listed for word in shlex.split(line)}


def test_the_tested_versions_fit_together():
    """What the installed packages require of one another, pip would find in constraints.txt."""
    pins, seen, left = constraints(), set(), requirements()
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        assert name not in pins or requirement.specifier.contains(pins[name], prereleases=True), requirement
        if (name, *sorted(requirement.extras)) in seen:
            continue
        seen.add((name, *sorted(requirement.extras)))
        for line in metadata.requires(name) or []:
            needed = Requirement(line)
            if not needed.marker or any(needed.marker.evaluate({"extra": e}) for e in ("", *requirement.extras)):
                left.append(needed)
    assert len(seen) > 2 * len(requirements())


def test_no_file_that_installs_names_a_host():
    for name in ("Makefile", "environment.yaml", "constraints.txt", "pyproject.toml", ".ci/run"):
        assert "://" not in (ROOT / name).read_text(), name


def test_ci_runs_the_tests_the_notebooks_ruff_and_the_import_contracts():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert {"make test", "make notebooks", "make docs", "make lint"} <= set(script.read_text().splitlines())
    notebooks = subprocess.run(["make", "-n", "notebooks"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert any("--nbmake" in line and line.endswith(" notebooks") for line in notebooks.splitlines())
    lint = subprocess.run(["make", "-n", "lint"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "ruff check" in lint
    assert "lint-imports" in lint


def test_the_readme_leads_with_the_two_commands():
    assert [command for command in readme_commands() if command.startswith("make")][:2] == ["make demo", "make test"]
    assert "make demo" in BLOCKS[0]


def source_of(command: list[str]) -> str:
    """Source text that defines the options of a README command in Python."""
    _, *rest = command
    if rest[0] == "-m":
        return "".join(path.read_text() for path in Path(importlib.util.find_spec(rest[1]).origin).parent.glob("*.py"))
    if rest[0] == "main.py":
        return (ROOT / "ldm" / "training" / "command.py").read_text()
    return (ROOT / rest[0]).read_text()


@pytest.mark.parametrize("line", [c for c in readme_commands() if c.split()[0] in ("python", "histoldm", "make")])
def test_readme_commands_exist(line):
    program, *rest = words = shlex.split(line)
    if program == "make":
        subprocess.run(["make", "-n", *rest], cwd=ROOT, capture_output=True, check=True)
        return
    if program == "histoldm":
        get_command(app).commands[rest[0]].make_context(line, rest[1:])
    else:
        known = set(re.findall(r"\"(--?[a-z][\w-]*)\"", source_of(words)))
        if rest[0] == "main.py":
            known |= {f"--{name}" for name in inspect.signature(Trainer.__init__).parameters}
        for option in (word.split("=")[0] for word in rest if re.match(r"--?[a-z]", word) and word != "-m"):
            assert option in known, f"{option} of `{line}`"
    for word in rest:
        if re.match(r"(configs|data)/.*", word) and "*" not in word and not word.startswith("data/my"):
            assert (ROOT / word).exists(), f"{word} of `{line}`"


def test_the_readme_python_example_names_what_is_there():
    import ldm

    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    compile(example, "README.md", "exec")
    for name in set(re.findall(r"\bldm\.(\w+)\(", example)):
        assert callable(getattr(ldm, name))


def test_links_in_the_readme_point_to_files():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_citation_is_of_this_version_and_names_the_five_sources():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert (citation["title"], citation["version"], citation["license"]) == ("HistoLDM", project()["version"], "MIT")
    assert len(citation["references"]) == 5
    for reference in citation["references"]:
        assert {"type", "title", "authors", "year"} <= reference.keys()
        assert "doi" in reference or "identifiers" in reference


def test_version_is_the_changelogs():
    assert f"## [{project()['version']}]" in (ROOT / "CHANGELOG.md").read_text()
