"""The API against its own description, by requests that nobody thought of."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, assume, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import ignored_auth, positive_data_acceptance

from evomerge.service.folders import export_folder
from evomerge.store import Queue, Tokens
from tests.service.serving import Served, served

# Streams that do not end are tested elsewhere.
STREAMS = r"/events$"
# A cursor or a job may be text, as the schema says, and still make no sense. Who tries too many
# wrong tokens is soon refused whatever they ask; who is let in is tested elsewhere.
_EXCLUDED = [positive_data_acceptance, ignored_auth]


@dataclass
class Described:
    """What a server says of itself, a token with every scope, and what is there: by a part of the
    path that leads to it, the parameters of the path."""

    schema: Any
    headers: dict[str, str]
    there: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def described(searched: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Described]:
    """Of a finished search."""
    folder = tmp_path_factory.mktemp("described")
    with served(folder, searched, hosts=("testserver",)) as server:
        _, secret = Tokens(server.store).create("all", ["admin", "unseal"])
        headers = {"Authorization": f"Bearer {secret}"}
        schema = schemathesis.openapi.from_asgi("/api/v1/openapi.json", server.app, headers=headers)
        there = {
            "/searches/{name}": {"name": "tiny"},
            "/candidates/{id}": {"id": 3},
            "/exports/{id}": {"id": _exported(server)},
            "/files/{file}": {"file": "a.txt"},
        }
        yield Described(schema.exclude(path_regex=STREAMS), headers, there)


def _exported(server: Served) -> int:
    """An export of one file that has finished."""
    queue = Queue(server.store)
    one = queue.submit("export", "tiny", {"candidate": 3, "recipe_only": True}, by="anna")
    folder = export_folder(server.settings.data, "tiny", 3, recipe_only=True)
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("hello")
    queue.begin(one.id)
    queue.end(one.id, "finished", (), None, {})
    return one.id


def check(described: Described, mode: GenerationMode, examples: int) -> None:
    """Every operation, by so many requests; by those that follow the schema, of what is there."""
    for found in described.schema.get_all_operations():
        operation = found.ok()
        if mode.is_negative and not _can_be_wrong(operation):
            continue

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=examples,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.generate],
        )
        def ask(case: Any) -> None:
            if mode.is_positive:
                for part, values in described.there.items():
                    case.path_parameters |= values if part in case.path else {}
            # A key without a value is not sent at all, so that nothing is wrong with it.
            assume(all(value not in (None, [], {}) for value in (case.query or {}).values()))
            case.call_and_validate(headers=described.headers, excluded_checks=_EXCLUDED)

        ask()


def _can_be_wrong(operation: Any) -> bool:
    """Whether there is anything in its requests that the schema says something of."""
    return any(
        map(len, (operation.path_parameters, operation.query, operation.headers, operation.body))
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_whatever_is_asked_is_answered_as_the_schema_says(
    described: Described, mode: GenerationMode
) -> None:
    check(described, mode, examples=2)


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_so_is_whatever_is_asked_for_longer(described: Described, mode: GenerationMode) -> None:
    check(described, mode, examples=30)
