"""How models are named: what may be a hub id, and which plus stands between model and adapter."""

import pytest

from evomerge.reference import HubId, halves, hub_id

FOLDERS = {"a", "b", "a+b", "org/name", "x+"}


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("org/name", HubId("org/name", None)),
        ("org/name@v1.0", HubId("org/name", "v1.0")),
        ("0-org_/na.me-7B@refs/pr/1", HubId("0-org_/na.me-7B", "refs/pr/1")),
        ("name", None),
        ("org/name/file", None),
        ("./name", None),
        ("../name", None),
        ("/org/name", None),
        ("org/name@", None),
        ("org/name@a@b", None),
        ("org/na me", None),
        ("", None),
    ],
)
def test_what_may_be_a_hub_id(name: str, meant: HubId | None) -> None:
    assert hub_id(name) == meant


@pytest.mark.parametrize(
    ("reference", "meant"),
    [
        ("a", ("a", None)),
        ("a+b", ("a+b", None)),
        ("b+a", ("b", "a")),
        ("a+b+a", ("a+b", "a")),
        ("x++a", ("x+", "a")),
        ("org/name+org/other@v1", ("org/name", "org/other@v1")),
        ("a+typo", ("a", "typo")),
        ("typo+org/adapter", ("typo", "org/adapter")),
        ("typo+other", ("typo+other", None)),
        ("", ("", None)),
    ],
)
def test_a_reference_has_two_halves_or_one(reference: str, meant: tuple[str, str | None]) -> None:
    assert halves(reference, FOLDERS.__contains__) == meant
