"""What a newcomer installs: the dependency files agree, and what makes and checks the project is there."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
FREE = {"torch", "torchvision"}  # their build depends on the machine


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements() -> list[Requirement]:
    extras = project()["optional-dependencies"]
    return [Requirement(line) for line in [*project()["dependencies"], *extras["dev"]]]


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


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


def test_ci_runs_what_the_readme_makes_the_notebooks_ruff_and_the_import_contracts():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    made = set(script.read_text().splitlines())
    assert {"make test", "make notebooks", "make lint"} <= made
    assert (
        set(re.findall(r"(?:(?<=^)|(?<=`))make [a-z]+", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
        <= made
    )
    notebooks = subprocess.run(["make", "-n", "notebooks"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert any("--nbmake" in line and line.endswith(" notebooks") for line in notebooks.splitlines())
    lint = subprocess.run(["make", "-n", "lint"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "ruff check" in lint
    assert "lint-imports" in lint


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
