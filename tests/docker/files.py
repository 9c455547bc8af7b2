"""What the folder docker/ says, read as Docker and Compose read it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.tiny import ROOT

DOCKER = ROOT / "docker"
COORDINATOR, WORKER = DOCKER / "coordinator.Dockerfile", DOCKER / "worker.Dockerfile"
MANIFESTS = sorted((DOCKER / "kuberay").glob("*.yaml"))

# What a user writes into docker/.env, for tests.
WRITTEN = {
    "POSTGRES_PASSWORD": "a password",
    "RAY_AUTH_TOKEN": "a token of some length, which nobody guesses",
    "SEARCH": "tiny",
    "JOB": "job.yaml",
}


@dataclass(frozen=True)
class Instruction:
    """Of a Dockerfile, such as ("COPY", ". ."), continued lines joined."""

    name: str
    text: str


def instructions(dockerfile: Path) -> list[Instruction]:
    """In order, without comments."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.startswith("#")]
    whole = re.sub(r"\\\n", " ", "\n".join(lines))
    words = [line.split(maxsplit=1) for line in whole.splitlines() if line.strip()]
    return [Instruction(name, " ".join(text.split())) for name, text in words]


def last_stage(dockerfile: Path) -> list[Instruction]:
    """The instructions that the image itself is made by."""
    found = instructions(dockerfile)
    begin = max(i for i, each in enumerate(found) if each.name == "FROM")
    return found[begin:]


def environment(dockerfile: Path) -> dict[str, str]:
    """Which ENV gives to whatever runs in the image."""
    pairs = [each.text.split() for each in last_stage(dockerfile) if each.name == "ENV"]
    return dict(pair.split("=", 1) for text in pairs for pair in text)


def compose(written: Mapping[str, str]) -> dict[str, Any]:
    """compose.yaml as Compose sees it where .env has these variables. Raises KeyError for one that
    is required and missing."""
    text = (DOCKER / "compose.yaml").read_text()
    document: dict[str, Any] = _interpolated(yaml.safe_load(text), written)
    return document


def manifests() -> list[tuple[str, dict[str, Any]]]:
    """The documents of the manifests for Kubernetes, each with its file's name."""
    return [
        (path.name, document)
        for path in MANIFESTS
        if path.name != "values.yaml"
        for document in yaml.safe_load_all(path.read_text())
    ]


_VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|\{(?P<name>\w+)(?::(?P<how>[-?])(?P<rest>[^}]*))?\})")


def _interpolated(node: Any, written: Mapping[str, str]) -> Any:
    if isinstance(node, dict):
        return {key: _interpolated(value, written) for key, value in node.items()}
    if isinstance(node, list):
        return [_interpolated(value, written) for value in node]
    if not isinstance(node, str):
        return node

    def value(found: re.Match[str]) -> str:
        if found["dollar"]:
            return "$"
        name = found["name"]
        return written.get(name) or found["rest"] if found["how"] == "-" else written[name]

    return _VARIABLE.sub(value, node)
