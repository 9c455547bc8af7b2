"""Requests that are sent twice and served once."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from itertools import islice

import pytest

from evomerge.errors import InputError, KeyReused
from evomerge.service import idempotency
from evomerge.service.idempotency import Answers, of_queue
from evomerge.service.problems import Busy


def test_what_is_asked_for_at_the_same_time_is_done_once() -> None:
    answers, done = Answers(), list[int]()
    begun = threading.Barrier(8)

    def act() -> int:
        time.sleep(0.05)
        done.append(1)
        return len(done)

    def ask(_: int) -> int:
        begun.wait()
        return answers.once("anna", "a", "the same", act)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [1] * 8
    assert done == [1]


def test_a_key_belongs_to_whoever_sent_it() -> None:
    answers = Answers()
    assert answers.once("anna", "a", "x", lambda: 1) == 1
    assert answers.once("ben", "a", "x", lambda: 2) == 2
    assert of_queue("anna", "a") != of_queue("ben", "a")


def test_a_key_is_of_one_request() -> None:
    answers = Answers()
    answers.once("anna", "a", "x", lambda: 1)
    with pytest.raises(KeyReused):
        answers.once("anna", "a", "y", lambda: 1)


def test_what_failed_is_done_again() -> None:
    answers = Answers()

    def fail() -> int:
        raise InputError("not yet")

    with pytest.raises(InputError):
        answers.once("anna", "a", "x", fail)
    assert answers.once("anna", "a", "x", lambda: 3) == 3


def test_without_a_key_everything_is_done() -> None:
    answers, done = Answers(), list[int]()
    for _ in range(2):
        answers.once("anna", None, "x", lambda: done.append(1))
    assert done == [1, 1]


@contextmanager
def being_served(answers: Answers) -> Iterator[None]:
    """The request of anna's with the key 'a'."""
    begun, over = threading.Event(), threading.Event()

    def act() -> int:
        begun.set()
        over.wait()
        return 1

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(answers.once, "anna", "a", "x", act)
        begun.wait()
        try:
            yield
        finally:
            over.set()
        assert first.result() == 1


def test_nobody_waits_for_an_answer_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idempotency, "_WAIT", 0.01)
    answers = Answers()
    with being_served(answers), pytest.raises(Busy, match="try again later"):
        answers.once("anna", "a", "x", lambda: 2)
    assert answers.once("anna", "a", "x", lambda: 2) == 1


def test_few_wait_for_an_answer_and_others_are_told_at_once() -> None:
    answers = Answers()
    with ThreadPoolExecutor(11) as pool, being_served(answers):
        asked = [pool.submit(answers.once, "anna", "a", "x", lambda: 2) for _ in range(11)]
        refused = list(islice(as_completed(asked), 4))
        assert all(isinstance(one.exception(), Busy) for one in refused)


def test_what_is_still_being_done_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idempotency, "_REMEMBERED", 2)
    monkeypatch.setattr(idempotency, "_WAIT", 0.01)
    answers = Answers()
    with being_served(answers):
        for key in ("b", "c", "d"):
            answers.once("anna", key, "x", lambda: 1)
        with pytest.raises(Busy):
            answers.once("anna", "a", "x", lambda: 2)


def test_an_answer_that_may_be_secret_is_forgotten_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idempotency, "_KEPT", 0.0)
    answers = Answers()
    answers.once("anna", "a", "x", lambda: 1)
    time.sleep(0.002)
    assert answers.once("anna", "a", "x", lambda: 2) == 2


def test_the_oldest_answers_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idempotency, "_REMEMBERED", 2)
    answers = Answers()
    for key in ("a", "b", "c"):
        answers.once("anna", key, "x", lambda: 1)
    assert answers.once("anna", "a", "x", lambda: 2) == 2
    assert answers.once("anna", "c", "x", lambda: 2) == 1
