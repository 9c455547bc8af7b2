"""Jinja over a record, in a sandbox: a task file may come from anywhere, and a template can reach
any Python object that it is given."""

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.nativetypes import NativeCodeGenerator
from jinja2.sandbox import SandboxedEnvironment

from evomerge.errors import TaskError
from evomerge.fitness.data import Record
from evomerge.messages import one_line


class _Native(SandboxedEnvironment):
    """Gives the values of expressions rather than their texts."""

    code_generator_class = NativeCodeGenerator


def _not_null(value: Any) -> Any:
    """Else a field without a value would read "None"."""
    if value is None:
        raise jinja2.TemplateRuntimeError(
            "a value is null, and has no text: write {{ field or '' }} where that may be"
        )
    return value


_TEXTS = SandboxedEnvironment(
    undefined=jinja2.StrictUndefined,
    autoescape=False,
    keep_trailing_newline=True,
    finalize=_not_null,
)
_VALUES = _Native(undefined=jinja2.StrictUndefined, autoescape=False)
for _environment in (_TEXTS, _VALUES):
    # Both draw from the global generator: an item would be another one each time.
    del _environment.filters["random"]
    del _environment.globals["lipsum"]


class Template:
    """The text that a key of a task file makes of a record."""

    def __init__(self, path: Path, key: str, text: str) -> None:
        """Raises TaskError for what is no template."""
        self._template = _compiled(_TEXTS, path, key, text)
        self._text = text

    def of(self, record: Record) -> str:
        """Raises TaskError, with the record's place, where the template does not fit it."""
        try:
            text = self._template.render(record.fields)
            text.encode()  # raises for half a surrogate pair, which no model could be given
        except Exception as error:  # whatever the task's own expressions raise
            raise _unfit(record, error) from None
        return text

    def own(self, record: Record) -> str:
        """What the record gives to the text, see OwnWords. For a record that `of` takes."""
        return self._own.of(record.fields, self.of(record))

    @cached_property
    def _own(self) -> "OwnWords":
        return OwnWords(_TEXTS, self._text)


class Expression:
    """The value that a key of a task file makes of a record: that of its expression, where it is
    one and nothing else; else a text."""

    def __init__(self, path: Path, key: str, text: str) -> None:
        """Raises TaskError for what is no template."""
        self._template = _compiled(_VALUES, path, key, text.strip())

    def of(self, record: Record) -> Any:
        """Raises TaskError, with the record's place, where the template does not fit it."""
        try:
            context = self._template.new_context(dict(record.fields))
            found: list[Any] = list(self._template.root_render_func(context))
            value = found[0] if len(found) == 1 else "".join(map(str, found))
            if isinstance(value, jinja2.Undefined):
                str(value)  # raises, with its name
        except Exception as error:  # whatever the task's own expressions raise
            raise _unfit(record, error) from None
        return value


# What stands between these is a template's own. No text holds them: Unicode keeps them for uses
# inside a program.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_CONSTANT = re.compile(f"{_OPEN}[^{_CLOSE}]*{_CLOSE}")


class OwnWords:
    """What records give to the texts that a template makes: the words of the template itself, which
    it says in every text, left out."""

    def __init__(self, environment: jinja2.Environment, text: str) -> None:
        """text: of a template of this environment."""
        tree = environment.parse(text)
        for constant in tree.find_all(nodes.TemplateData):
            constant.data = f"{_OPEN}{constant.data}{_CLOSE}"
        self._marked = environment.from_string(tree)

    def of(self, fields: Mapping[str, Any], text: str) -> str:
        """Of the text that the template makes of a record. All of it where the template does
        something with its own words, so that they cannot be marked."""
        try:
            made = self._marked.render(fields)
        except Exception:  # of whatever the words are given to
            return text
        unmarked = made.replace(_OPEN, "").replace(_CLOSE, "")
        return _CONSTANT.sub(" ", made) if unmarked == text else text


def _compiled(
    environment: SandboxedEnvironment, path: Path, key: str, text: str
) -> jinja2.Template:
    try:
        return environment.from_string(text)
    except jinja2.TemplateError as error:
        raise TaskError(f"{path}: {key}: not a Jinja template: {one_line(error)}") from None


def _unfit(record: Record, error: Exception) -> TaskError:
    return TaskError(f"{record.where}: the template does not fit the record: {one_line(error)}")
