"""Secrets taken out of text that is written down or shown. Knows nothing of who writes it."""

import logging
import os
import re
from collections.abc import Mapping
from typing import Any

from evomerge.messages import without_password

_ENVIRONMENT = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "EVOMERGE_TOKEN")
_SHORTEST = 8  # characters: less is no secret, and would be found in ordinary words
_HIDDEN = "***"
_PATTERNS = (
    (re.compile(r"(?<![A-Za-z0-9])(evm|hf)_[A-Za-z0-9_-]{8,}"), rf"\1_{_HIDDEN}"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}"), rf"\1 {_HIDDEN}"),
)
_WORD = re.compile(r"\S+")  # a URL, maybe
# Of the handlers of these loggers; uvicorn's do not pass on to the root.
_LOGGERS = (None, "uvicorn", "uvicorn.error", "uvicorn.access")


def redacted(text: str) -> str:
    """The text without tokens of evomerge and of the hub, and without passwords in URLs. Anybody's
    text: it takes a time in proportion to its length."""
    for name in _ENVIRONMENT:
        secret = os.environ.get(name, "")
        if len(secret) >= _SHORTEST:
            text = text.replace(secret, _HIDDEN)
    for pattern, shown in _PATTERNS:
        text = pattern.sub(shown, text)
    return _WORD.sub(lambda word: without_password(word[0]), text)


def redacted_within(value: Any) -> Any:
    """Plain data, its texts redacted."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, Mapping):
        return {key: redacted_within(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_within(inner) for inner in value]
    return value


def redact_logs() -> None:
    """From now on nothing secret is logged, whichever handler of this process writes it. Called
    once logging is set up, uvicorn's too."""
    for name in _LOGGERS:
        for handler in logging.getLogger(name).handlers:
            if not any(isinstance(found, _Redaction) for found in handler.filters):
                handler.addFilter(_Redaction())


class _Redaction(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == "uvicorn.access" and isinstance(record.args, tuple):
            # Its formatter takes them one by one.
            record.args = tuple(redacted(a) if isinstance(a, str) else a for a in record.args)
        else:
            record.msg, record.args = redacted(record.getMessage()), None
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = redacted(record.exc_text)
        if record.stack_info:
            record.stack_info = redacted(record.stack_info)
        return True
