"""The documents say what is true: examples parse, links lead somewhere, lists match the code."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from evomerge.cli.app import app
from evomerge.job import Job
from tests.tiny import ROOT

DOCUMENTS = sorted(
    [
        ROOT / "README.md",
        ROOT / "CHANGELOG.md",
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("examples/**/README.md"),
    ]
)
ids = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.M | re.S)


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_every_relative_link_leads_to_a_file(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_every_job_in_a_document_is_a_job(path: Path) -> None:
    for block in blocks(path, "yaml"):
        data = yaml.safe_load(block)
        if "parents" in data:
            Job.from_dict(data, path.name)


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_every_command_in_a_document_has_its_options(path: Path) -> None:
    group: Any = typer.main.get_command(app)  # a group of commands, typed as a command
    for block in blocks(path, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if not words or words[0] != "evomerge":
                continue
            command, rest = group, words[1:]
            while rest and hasattr(command, "commands"):
                command, rest = command.commands[rest[0]], rest[1:]
            known = {option for parameter in command.params for option in parameter.opts}
            used = {word.split("=")[0] for word in rest if word.startswith("-")}
            assert used <= known, line


def test_every_make_target_that_a_document_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for path in DOCUMENTS:
        named = set(re.findall(r"`make ([a-z-]+)`", path.read_text()))
        assert named <= targets, path.name


def test_the_architecture_names_every_part_of_the_package() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    parts = {p.stem for p in (ROOT / "evomerge").iterdir() if not p.name.startswith("_")}
    missing = [part for part in sorted(parts) if f"`{part}`" not in text]
    assert not missing


def test_paths_that_the_architecture_names_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = re.findall(r"`((?:[a-z_]+/)+[a-z_]*(?:\.py)?)[:`]", text)
    assert named
    for name in named:
        assert (ROOT / name).exists() or (ROOT / "evomerge" / name).exists(), name


def test_every_decision_is_numbered_once() -> None:
    numbers = [path.name[:3] for path in sorted((ROOT / "docs" / "decisions").glob("*.md"))]
    assert numbers == [f"{i:03d}" for i in range(1, len(numbers) + 1)]


def test_every_preset_and_task_of_the_readme_ships() -> None:
    text = (ROOT / "README.md").read_text()
    presets = {path.stem for path in (ROOT / "search_spaces").glob("*.yaml")}
    assert set(re.findall(r"preset: ([a-z_]+)", text)) <= presets
