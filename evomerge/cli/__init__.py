"""The command line. Results go to stdout, everything else to stderr; heavy parts of the package
are loaded by the commands that need them."""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

_INTERRUPTED = 130  # which typer makes of Ctrl-C


def command() -> None:
    """Run the command line as a process of its own.

    A merge leaves without taking its modules down: they hold nothing, and torch takes half a second
    over it, as long as merging a small model. So does what is interrupted, whose modules may be in
    no state to be taken down. What a terminated merge has half-written is removed.
    """
    signal.signal(signal.SIGINT, _interrupted)
    signal.signal(signal.SIGTERM, lambda number, frame: fail("terminated", 128 + number))
    try:
        main()
    except SystemExit as end:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is said; taking modules down is left
        is_merge = sys.argv[1:2] == ["merge"] and isinstance(end.code, int)
        if not is_merge and end.code != _INTERRUPTED:
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(end.code or 0))


def main() -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong input, 130 interrupted."""
    try:  # modules take a while to load, too
        code = _run()
    except KeyboardInterrupt:
        code = _INTERRUPTED
    if code == _INTERRUPTED:
        fail("interrupted", code)
    sys.exit(code)


def _run() -> int:
    """The exit code of a command that ends without an error."""
    import typer

    from evomerge.cli.app import app
    from evomerge.cli.options import NO_COUNTERPART
    from evomerge.errors import EvomergeError

    try:
        return app(standalone_mode=False) or 0
    except EvomergeError as error:
        fail(str(error), error.exit_code)
    except typer.TyperException as error:
        flag = getattr(error, "option_name", None)
        if sys.argv[1:2] == ["run"] and flag in NO_COUNTERPART:
            fail(f"{flag} of mergekit-evolve: {NO_COUNTERPART[flag]}: leave it out", 2)
        fail(f"{error.format_message().rstrip('.')}: see --help", 2)
    except typer.Abort:
        return _INTERRUPTED


def _interrupted(number: int, frame: FrameType | None) -> None:
    """Ctrl-C. A module that is being loaded might swallow an exception, or make another one of it;
    loading takes seconds, and nothing is half-written meanwhile."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(sys.stderr.fileno(), b"evomerge: interrupted\n")
            os._exit(_INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def fail(message: str, code: int) -> NoReturn:
    """One line on stderr, then exit."""
    sys.stderr.write(f"evomerge: {' '.join(message.split())}\n")
    sys.exit(code)
