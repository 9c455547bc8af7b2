"""Runs Python that nobody has read: in bubblewrap, or not at all.

A program gets the interpreter and its standard library, read-only, an empty /tmp, and nothing
else of this machine: no network, no other files or processes, no environment, no /proc. It is one
process, which a system call filter sees to, so that the limits of a process are the limits of all
that it does: processor time, memory, file size, open files. Threads are allowed. What of the
kernel's memory no limit counts (System V shared memory, memfd) is refused. When it is over, nothing
is left: its files were in memory, and its process namespace dies with it, or with us.

Not defended against: faults of the kernel, and a program that reads the secret in the frames of
the interpreter that it shares with sandboxed.py.
"""

import errno
import math
import os
import platform
import secrets
import select
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from evomerge.errors import TaskError
from evomerge.fitness.sandboxed import BEGUN

_TMP_MB = 64
_HARNESS, _PROGRAM = "/sandboxed.py", "/program.py"
_OUTPUT = 1 << 16  # bytes that are kept of what is printed
# On a busy machine a program gets a part of a core, and a right one must not fail for that.
_WALL_PER_CPU_SECOND = 3.0


class NoSandbox(TaskError):
    """The sandbox cannot be set up here."""


@dataclass(frozen=True)
class Ran:
    """What came of a program.

    finished: it ran to its end: no exception, no exit before that, not killed. output: what it
    printed, errors included, the first 64 KiB of it.
    """

    finished: bool
    output: str


def run(program: str, seconds: float, memory_mb: int) -> Ran:
    """Run Python code. seconds: of processor time, rounded up; three times as much of wall time.
    memory_mb: MiB of address space. Raises NoSandbox."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise NoSandbox("bubblewrap is not installed (apt install bubblewrap)")
    secret = secrets.token_hex(16).encode()
    seconds = math.ceil(seconds)
    with ExitStack() as stack:
        text, rules, stdin, output = (
            stack.enter_context(_memory_file(content))
            for content in (program.encode("utf-8", "replace"), _filter(), secret, b"")
        )
        source, sink = os.pipe()
        report = stack.enter_context(open(source, "rb"))
        with open(sink, "wb") as pipe:
            limits = map(str, (pipe.fileno(), seconds, memory_mb))
            try:
                process = subprocess.Popen(
                    [bwrap, *_walls(text.fileno(), rules.fileno()), *_interpreter(), *limits],
                    stdin=stdin,
                    stdout=output,
                    stderr=output,
                    pass_fds=(text.fileno(), rules.fileno(), pipe.fileno()),
                    env={},
                    start_new_session=True,  # Ctrl-C is for us: it must not end a program early
                )
            except OSError as error:  # says nothing of the program: no processes left, a bad file
                raise NoSandbox(f"bubblewrap cannot be started: {error.strerror}") from None
        try:
            _await(process.pid, seconds * _WALL_PER_CPU_SECOND)
        finally:
            process.kill()  # and with it all that is inside
            process.wait()
        said = report.read()  # until the last process that could write it is gone
        output.seek(0)
        printed = output.read(_OUTPUT).decode("utf-8", "replace")
    if not said.startswith(BEGUN):
        reason = printed.strip().rpartition("\n")[2] or "it did not start in time"
        raise NoSandbox(f"bubblewrap does not work here: {reason}")
    return Ran(said == BEGUN + secret, printed)


def check() -> None:
    """Whether programs can be run here: runs an empty one. Raises NoSandbox."""
    run("", 10, 1024)


def _await(pid: int, seconds: float) -> None:
    """Until a child ends, or for so long. Wakes up at once, where Popen.wait polls."""
    descriptor = os.pidfd_open(pid)
    try:
        ended = select.poll()
        ended.register(descriptor, select.POLLIN)
        ended.poll(seconds * 1000)
    finally:
        os.close(descriptor)


def _walls(program: int, rules: int) -> list[str]:
    """bubblewrap's options. program, rules: descriptors that it reads them from."""
    command = ["--unshare-all", "--unshare-user", "--die-with-parent", "--new-session"]
    command += ["--uid", "65534", "--gid", "65534", "--hostname", "sandbox"]
    command += ["--cap-drop", "ALL"]  # root's are kept otherwise
    for folder in ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache"):
        command += ["--ro-bind-try", folder, folder]
    for folder in dict.fromkeys((sys.base_prefix, sys.base_exec_prefix)):
        if not Path(folder).is_relative_to("/usr"):
            command += ["--ro-bind", folder, folder]
    for device in ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"):
        command += ["--dev-bind", device, device]
    command += ["--ro-bind", str(Path(__file__).with_name("sandboxed.py")), _HARNESS]
    command += ["--file", str(program), _PROGRAM]
    command += ["--size", str(_TMP_MB << 20), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    command += ["--remount-ro", "/"]  # in memory too, and without a limit of its own
    command += ["--clearenv", "--setenv", "HOME", "/tmp", "--setenv", "LANG", "C.UTF-8"]
    command += ["--setenv", "PYTHONHASHSEED", "0"]  # the order of sets is the same every time
    return [*command, "--seccomp", str(rules)]


def _interpreter() -> list[str]:
    """The one that runs this, without what is installed beside it."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return [str(Path(sys.base_exec_prefix, "bin", version)), "-P", "-S", _HARNESS, _PROGRAM]


@dataclass(frozen=True)
class _Kernel:
    """System calls by number, as one architecture has them.

    audit: how the kernel names the architecture. refused: calls that make processes or namespaces
    (fork, vfork, unshare, setns), memory that no limit counts (memfd_create, memfd_secret, shmget,
    msgget, semget), a way around a filter (io_uring_setup), and hands on the process that waits for
    this one, which has no limits (ptrace, process_vm_readv, process_vm_writev, pidfd_getfd).
    foreign: the first number of another table.
    """

    audit: int
    clone: int
    refused: tuple[int, ...]
    foreign: int | None = None
    clone3: int = 435


_KERNELS = {
    "x86_64": _Kernel(
        0xC000003E,
        56,
        (57, 58, 272, 308, 319, 447, 29, 68, 64, 425, 101, 310, 311, 438),
        foreign=0x40000000,
    ),
    "aarch64": _Kernel(
        0xC00000B7, 220, (97, 268, 279, 447, 194, 186, 190, 425, 117, 270, 271, 438)
    ),
}


def _filter() -> bytes:
    """A program of classic BPF over struct seccomp_data (seccomp(2)): nr, arch, ..., args."""
    kernel = _KERNELS.get(platform.machine())
    if kernel is None:
        raise NoSandbox(
            f"no filter for the system calls of {platform.machine()}: use {' or '.join(_KERNELS)}"
        )
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000  # refuse: with an errno
    nr, arch, flags = 0, 4, 16  # offsets; flags: the lower half of the first argument
    thread = 0x00010000  # CLONE_THREAD

    # Each is (code, operand, jump if true, jump if false); jumps count from the next one.
    rules = [(load, arch, 0, 0), (equal, kernel.audit, 1, 0), (give, kill, 0, 0), (load, nr, 0, 0)]
    if kernel.foreign is not None:
        rules += [(at_least, kernel.foreign, 0, 1), (give, kill, 0, 0)]
    for call in kernel.refused:
        rules += [(equal, call, 0, 1), (give, refuse | errno.EPERM, 0, 0)]
    # Its flags are out of a filter's sight; with ENOSYS, libraries turn to clone.
    rules += [(equal, kernel.clone3, 0, 1), (give, refuse | errno.ENOSYS, 0, 0)]
    rules += [(equal, kernel.clone, 0, 3), (load, flags, 0, 0), (any_bit, thread, 1, 0)]
    rules += [(give, refuse | errno.EPERM, 0, 0), (give, allow, 0, 0)]
    return b"".join(
        struct.pack("=HBBI", code, true, false, operand) for code, operand, true, false in rules
    )


@contextmanager
def _memory_file(content: bytes) -> Iterator[BinaryIO]:
    """A file in memory, to be read from its start."""
    with open(os.memfd_create("sandbox"), "w+b") as file:
        file.write(content)
        file.seek(0)
        yield file
