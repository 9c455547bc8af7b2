"""lm_eval itself: loaded on first use, quiet, and with its templates in a sandbox."""

import logging
import os
from functools import cache
from typing import Any

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from evomerge.errors import TaskError


@cache
def library() -> Any:
    """The package lm_eval, with the modules that are used. Raises TaskError where it is missing."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        import lm_eval
        import lm_eval.api.metrics
        import lm_eval.api.registry
        import lm_eval.config.task
        import lm_eval.models.utils
        import lm_eval.tasks
        import lm_eval.utils
    except ImportError as error:
        raise TaskError(
            f"tasks of lm-eval are run by lm-eval ({error}): pip install 'evomerge[lm-eval]'"
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm_eval.utils.env = _Templates(lm_eval.utils.env)
    return lm_eval


class _Templates(SandboxedEnvironment):
    """lm-eval's environment of templates, which knows no sandbox and compiles a template each time
    it is rendered: a task file may come from anywhere, and is rendered thousands of times."""

    def __init__(self, own: jinja2.Environment) -> None:
        super().__init__(
            loader=own.loader,
            undefined=own.undefined,
            keep_trailing_newline=own.keep_trailing_newline,
        )
        self.filters.update(own.filters)
        self._compiled: dict[str, jinja2.Template] = {}

    def from_string(self, source: Any, *options: Any, **more: Any) -> jinja2.Template:
        """As jinja2 does, once for each text."""
        if source not in self._compiled:
            self._compiled[source] = super().from_string(source, *options, **more)
        return self._compiled[source]
