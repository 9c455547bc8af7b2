"""Tokens: what is kept of them, whom they open to, and until when."""

import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import InputError, NotFound, StoreError
from evomerge.store import SCOPES, Store, Tokens
from tests.running import query, url

HASHED = re.compile(r"[0-9a-f]{64}")


@pytest.fixture
def tokens(fresh_url: str) -> Iterator[Tokens]:
    with Store(fresh_url, create=True) as store:
        yield Tokens(store)


def test_a_token_is_found_by_its_secret_and_is_what_it_was_made_as(tokens: Tokens) -> None:
    made, secret = tokens.create("anna", ["unseal", "read"])
    assert re.fullmatch(r"evm_[A-Za-z0-9_-]{43}", secret)
    assert tokens.find(secret) == tokens.get(made.id) == made
    assert (made.name, made.scopes, made.state) == ("anna", {"read", "unseal"}, "usable")
    assert tokens.all() == [made]


def test_the_store_holds_no_secret_only_its_hash(tmp_path: Path) -> None:
    with Store(url(tmp_path / "store.db"), create=True) as store:
        made, secret = Tokens(store).create("anna", ["read"])
        assert secret not in repr(made)
    files = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"anna" in files
    assert secret.encode() not in files
    ((stored,),) = query(tmp_path / "store.db", "SELECT sha256 FROM token")
    assert HASHED.fullmatch(stored)


def test_a_token_that_has_expired_opens_nothing_any_more(
    tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, secret = tokens.create("anna", ["read"], timedelta(hours=1))
    assert tokens.find(secret) is not None
    assert made.expires_at is not None
    monkeypatch.setattr("evomerge.store.tokens.now", lambda: made.expires_at)
    assert tokens.find(secret) is None
    assert tokens.get(made.id) is None
    assert [token.state for token in tokens.all()] == ["expired"]


def test_a_revoked_token_opens_nothing_and_stays_revoked_since_when_it_was(tokens: Tokens) -> None:
    made, secret = tokens.create("anna", ["read"])
    _, other = tokens.create("bert", ["read"])
    revoked = tokens.revoke("anna")
    assert revoked.state == "revoked"
    assert tokens.find(secret) is None
    assert tokens.get(made.id) is None
    assert tokens.find(other) is not None
    time.sleep(0.01)
    assert tokens.revoke("anna") == revoked


def test_there_are_tokens_once_one_was_made_whatever_became_of_it(tokens: Tokens) -> None:
    assert not tokens.any()
    tokens.create("anna", ["read"])
    tokens.revoke("anna")
    assert tokens.any()


def test_the_use_of_a_token_is_written_down_once_a_minute(tokens: Tokens) -> None:
    made, secret = tokens.create("anna", ["read"])
    assert made.used_at is None
    tokens.touch(made)
    used = tokens.find(secret)
    assert used is not None
    assert used.used_at is not None
    time.sleep(0.01)
    tokens.touch(used)
    tokens.touch(made)  # who read it before that was written
    assert tokens.find(secret) == used


def test_a_use_a_minute_later_is_written_down_again(tmp_path: Path) -> None:
    with Store(url(tmp_path / "store.db"), create=True) as store:
        tokens = Tokens(store)
        tokens.touch(tokens.create("anna", ["read"])[0])
        before = "2020-01-01T00:00:00.000+00:00"
        with closing(sqlite3.connect(tmp_path / "store.db")) as db, db:
            db.execute("UPDATE token SET used_at = ?", [before])
        (token,) = tokens.all()
        assert token.used_at == before
        tokens.touch(token)
        (token,) = tokens.all()
        assert token.used_at is not None
        assert token.used_at > before


def test_names_are_used_once_and_words_of_the_audit_log_never(tokens: Tokens) -> None:
    tokens.create("anna", ["read"])
    with pytest.raises(StoreError, match="token 'anna': there is one of this name"):
        tokens.create("anna", ["read"])
    with pytest.raises(InputError, match="'local' is what the audit log calls others"):
        tokens.create("local", ["read"])


@pytest.mark.parametrize("name", ["", "a b", "-a", "a/b", "a\n", "a" * 65, "ä", "a\0"])
def test_a_name_that_could_not_be_told_in_a_log_is_refused(tmp_path: Path, name: str) -> None:
    with Store(url(tmp_path / "store.db"), create=True) as store:
        with pytest.raises(InputError, match="use letters, digits"):
            Tokens(store).create(name, ["read"])
        assert Tokens(store).all() == []


@pytest.mark.parametrize(
    ("scopes", "lifetime", "says"),
    [
        ([], None, "no scope: give one or more of read, run, admin, unseal"),
        (["raed"], None, "scope 'raed' is unknown: did you mean 'read'"),
        (["read"], timedelta(0), "would have expired already"),
    ],
)
def test_a_token_that_could_never_be_used_is_not_made(
    tmp_path: Path, scopes: list[str], lifetime: timedelta | None, says: str
) -> None:
    with (
        Store(url(tmp_path / "store.db"), create=True) as store,
        pytest.raises(InputError, match=says),
    ):
        Tokens(store).create("anna", scopes, lifetime)


def test_revoking_what_is_not_there_names_what_is(tokens: Tokens) -> None:
    with pytest.raises(NotFound, match="evomerge token create"):
        tokens.revoke("anna")
    tokens.create("anna", ["read"])
    with pytest.raises(NotFound, match="did you mean 'anna'"):
        tokens.revoke("ana")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Tokens, str]]:
    with Store(url(tmp_path_factory.mktemp("tokens") / "store.db"), create=True) as store:
        _, secret = Tokens(store).create("anna", SCOPES)
        yield Tokens(store), secret


@pytest.mark.slow
@given(st.data())
@settings(derandomize=True, deadline=None, max_examples=200)
def test_nothing_but_the_secret_itself_finds_a_token(
    shared: tuple[Tokens, str], data: st.DataObject
) -> None:
    tokens, secret = shared
    at = st.integers(0, len(secret) - 1)
    well_formed = st.from_regex(r"evm_[A-Za-z0-9_-]{43}", fullmatch=True)
    changed = st.tuples(at, st.characters()).map(
        lambda change: secret[: change[0]] + change[1] + secret[change[0] + 1 :]
    )
    longer = st.tuples(st.text(max_size=3), st.text(max_size=3)).map(lambda p: p[0] + secret + p[1])
    shorter = at.map(lambda end: secret[:end])
    tried = data.draw(st.one_of(st.text(), well_formed, changed, longer, shorter))
    found = tokens.find(tried)
    assert (found is not None) == (tried == secret)


def test_the_hash_of_a_secret_opens_nothing(tmp_path: Path) -> None:
    with Store(url(tmp_path / "store.db"), create=True) as store:
        Tokens(store).create("anna", ["read"])
        ((stored,),) = query(tmp_path / "store.db", "SELECT sha256 FROM token")
        assert Tokens(store).find(stored) is None
        assert Tokens(store).find(f"evm_{stored[:43]}") is None
