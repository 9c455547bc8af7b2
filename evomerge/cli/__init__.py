"""The command line. Results go to stdout, everything else to stderr; heavy parts of the package
are loaded by the commands that need them."""

import os
import signal
import sys
from typing import NoReturn

_INTERRUPTED = 130  # which typer makes of Ctrl-C


def command() -> None:
    """Run the command line as a process of its own.

    A merge leaves without taking its modules down: they hold nothing, and torch takes half a second
    over it, as long as merging a small model. What a terminated merge has half-written is removed.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: fail("terminated", 128 + number))
    try:
        main()
    except SystemExit as end:
        if sys.argv[1:2] != ["merge"] or not isinstance(end.code, int):
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code)


def main() -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong input, 130 interrupted."""
    import typer

    from evomerge.cli.app import app
    from evomerge.cli.options import NO_COUNTERPART
    from evomerge.errors import EvomergeError

    try:
        code = app(standalone_mode=False) or 0
    except EvomergeError as error:
        fail(str(error), error.exit_code)
    except typer.TyperException as error:
        flag = getattr(error, "option_name", None)
        if sys.argv[1:2] == ["run"] and flag in NO_COUNTERPART:
            fail(f"{flag} of mergekit-evolve: {NO_COUNTERPART[flag]}: leave it out", 2)
        fail(f"{error.format_message().rstrip('.')}: see --help", 2)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    if code == _INTERRUPTED:
        fail("interrupted", code)
    sys.exit(code)


def fail(message: str, code: int) -> NoReturn:
    """One line on stderr, then exit."""
    sys.stderr.write(f"evomerge: {' '.join(message.split())}\n")
    sys.exit(code)
