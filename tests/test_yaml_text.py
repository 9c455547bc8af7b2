"""YAML as plain data: what PyYAML would say of it, but for keys that stand twice."""

import pytest
import yaml

from evomerge.yaml_text import RepeatedKey, load


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: 'a' is given in line 1 already: keep one of them"),
        ("a: 1\n'a': 1", "line 2: 'a' is given in line 1 already"),
        ("{a: 1, a: 2}", "line 1: 'a' is given in line 1 already"),
        ("- x:\n    y: 1\n    z: {w: 1}\n    y: 2", "line 4: 'y' is given in line 2 already"),
        ("1: a\n1: b", "line 2: '1' is given in line 1 already"),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_both_lines(text: str, message: str) -> None:
    with pytest.raises(RepeatedKey, match=message):
        load(text)


@pytest.mark.parametrize(
    "text",
    [
        "{a: 1, b: {a: 1}, c: [{a: 1}, {a: 2}]}",
        "base: &base {a: 1, b: 2}\nother: {<<: *base, a: 3}\nthird: {<<: *base, b: 4}",
        "base: &base\n  a: 1\nmiddle: &middle {<<: *base, a: 2}\nlast: {<<: *middle, a: 3}",
        "1: a\n'1': b",
        "a: 2026-02-03",
        "",
    ],
)
def test_everything_else_is_what_it_was(text: str) -> None:
    assert load(text) == yaml.safe_load(text)
