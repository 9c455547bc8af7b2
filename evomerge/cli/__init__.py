"""The command line. Results go to stdout, everything else to stderr; heavy parts of the package
are loaded by the commands that need them."""

import sys


def main() -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong input, 130 interrupted."""
    import typer

    from evomerge.cli.app import app
    from evomerge.errors import EvomergeError

    try:
        sys.exit(app(standalone_mode=False) or 0)
    except EvomergeError as error:
        fail(str(error), error.exit_code)
    except typer.TyperException as error:
        fail(f"{error.format_message().rstrip('.')}: see --help", 2)
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted", 130)


def fail(message: str, code: int) -> None:
    """One line on stderr, then exit."""
    sys.stderr.write(f"evomerge: {' '.join(message.split())}\n")
    sys.exit(code)
