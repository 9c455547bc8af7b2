"""What runs inside the sandbox: sets the limits, runs a program, and says whether it got through.

Started by sandbox.py as a script, in an interpreter that has the standard library only. Its input
holds a secret. On the pipe that it is told of it writes a byte when it begins, and the secret once
the program has run to its end: nothing else that a program prints or exits with can say that.
"""

import os
import resource
import sys
import types

BEGUN = b"+"
_FILE_MB = 16  # of one file, and of all that is printed
_OPEN_FILES = 64


def main() -> None:
    """Of the command line: the program, the number of the pipe, seconds, MiB of memory."""
    path, pipe, seconds, memory = sys.argv[1], *map(int, sys.argv[2:])
    secret = os.read(0, 64)
    with open("/dev/null", "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    with open(path, encoding="utf-8") as file:
        text = file.read()
    # A module of its own, and not __main__: what a reply does as a script is no part of the test.
    module = types.ModuleType("program")
    sys.modules["program"] = module
    sys.argv = [path]
    # Hard limits as well, so that they cannot be raised again, and the end is SIGKILL.
    for limit, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory << 20),
        (resource.RLIMIT_FSIZE, _FILE_MB << 20),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]  # the user's own may be stricter
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    os.write(pipe, BEGUN)
    exec(compile(text, path, "exec", dont_inherit=True), module.__dict__)
    sys.stdout.flush()
    os.write(pipe, secret)
    os._exit(0)  # whatever threads it left are none of its answer


if __name__ == "__main__":
    main()
