"""The sandbox, attacked for real: what a program can do, see and leave behind."""

import itertools
import os
import pwd
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evomerge.fitness import sandbox
from evomerge.fitness.sandbox import NoSandbox, Ran
from tests.tiny import ROOT

MARKS = itertools.count(500 + os.getpid() % 400)


@pytest.fixture
def mark() -> int:
    """MiB of memory, by which the processes of one program are found in the list of processes."""
    return next(MARKS)


def ran(program: str, seconds: float = 5, memory_mb: int = 512) -> Ran:
    return sandbox.run(program, seconds, memory_mb)


def processes(mark: int) -> list[str]:
    """Command lines, on this machine, of sandboxes with that much memory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"/program.py" in line and str(mark).encode() in line:
            found.append(b" ".join(line).decode())
    return found


def gone(mark: int) -> bool:
    """Whether no process of a program is left, or is dying still."""
    deadline = time.monotonic() + 5
    while processes(mark) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not processes(mark)


def test_a_program_that_runs_to_its_end_is_finished() -> None:
    assert ran("print('ä', 1 + 1)") == Ran(True, "ä 2\n")


def test_an_error_is_in_the_output() -> None:
    end = ran("def f():\n    raise ValueError('why')\nf()")
    assert not end.finished
    assert "ValueError: why" in end.output


@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "assert False",
        "1 +",
        "\0",
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
        "import os; os.execv('/bin/true', ['true'])",
        "import ctypes; ctypes.string_at(0)",
        "print('+' * 100); raise SystemExit(0)",
        # Whatever it writes to every descriptor, it does not know the secret.
        "import os\nfor i in range(64):\n  try: os.write(i, b'+' * 33)\n  except OSError: 0\n"
        "os._exit(0)",
    ],
)
def test_a_program_that_ends_before_its_end_is_not_finished(program: str) -> None:
    assert not ran(program).finished


def test_what_a_program_does_as_a_script_is_left_out() -> None:
    assert ran("if __name__ == '__main__': raise ValueError").finished


def test_the_same_program_prints_the_same_every_time() -> None:
    program = "print({str(i) for i in range(50)})"
    assert ran(program) == ran(program)


def test_the_environment_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert ran("import os; assert 'HF_TOKEN' not in os.environ; print(dict(os.environ))") == Ran(
        True, "{'HOME': '/tmp', 'LANG': 'C.UTF-8', 'PYTHONHASHSEED': '0', 'PWD': '/tmp'}\n"
    )


def test_only_the_interpreter_and_its_system_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    for path in (tmp_path / "secret", ROOT / "pyproject.toml", "/etc/passwd", "/proc/1/cmdline"):
        assert "FileNotFoundError" in ran(f"open({str(path)!r})").output
    assert ran("import os; print(os.listdir('/tmp'), os.path.exists('/proc/self'))") == Ran(
        True, "[] False\n"
    )


def test_what_is_installed_beside_the_interpreter_is_not_there() -> None:
    assert "ModuleNotFoundError" in ran("import pip").output


@pytest.mark.parametrize("folder", [str(ROOT), "/", "/usr", sys.base_prefix, "/dev", "/var"])
def test_nothing_can_be_written_but_tmp(folder: str) -> None:
    file = Path(folder, "evomerge-test-file")
    end = ran(f"open({str(file)!r}, 'w')")
    assert "Read-only file system" in end.output or "No such file" in end.output
    assert not file.exists()
    assert ran(
        "with open('/tmp/x', 'w') as f: f.write('1')\nassert open('x').read() == '1'"
    ).finished
    assert not Path("/tmp/x").exists()


def test_the_network_is_out_of_reach() -> None:
    abstract = f"\0evomerge-{os.getpid()}"
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        unix.bind(abstract)
        unix.listen()
        dial = f"import socket; socket.create_connection(('127.0.0.1', {tcp.getsockname()[1]}), 2)"
        assert "OSError" in ran(dial).output or "refused" in ran(dial).output
        name = f"import socket; socket.socket(socket.AF_UNIX).connect({abstract!r})"
        assert "refused" in ran(name).output
        for server in (tcp, unix):
            server.setblocking(False)
            with pytest.raises(BlockingIOError):
                server.accept()


CLONE, CLONE3 = (220, 435) if os.uname().machine == "aarch64" else (56, 435)


@pytest.mark.parametrize(
    "program",
    [
        "import os\nif not os.fork(): os._exit(0)",
        "import os\nwhile True:\n  try: os.fork()\n  except OSError: raise SystemExit",
        "import subprocess; subprocess.run(['/bin/true'])",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import os; os.system('/bin/true') == 0 or 1 / 0",
        "import multiprocessing as m; m.Process(target=print).start()",
        f"import ctypes, os\nchild = ctypes.CDLL(None).syscall({CLONE}, 17, 0, 0, 0, 0)\n"
        "if child == 0: os._exit(0)\nassert child > 0",
        f"import ctypes, os\nchild = ctypes.CDLL(None).syscall({CLONE3}, bytes(88), 88)\n"
        "if child == 0: os._exit(0)\nassert child > 0",
        "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0",
    ],
    ids=["fork", "bomb", "subprocess", "spawn", "system", "multi", "clone", "clone3", "unshare"],
)
def test_a_program_stays_one_process(program: str, mark: int) -> None:
    assert not ran(program, memory_mb=mark).finished
    assert gone(mark)


def test_the_process_that_waits_for_a_program_is_out_of_its_hands() -> None:
    attach = "import ctypes, os; assert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0"
    assert not ran(attach).finished
    # That process still has the secret, as its standard input.
    take = "import ctypes, os; assert ctypes.CDLL(None).syscall(438, os.pidfd_open(1), 0, 0) >= 0"
    assert not ran(take).finished


def test_a_program_may_have_threads_and_leave_them() -> None:
    assert ran(
        "import threading\n"
        "said = []\n"
        "thread = threading.Thread(target=said.append, args=(1,)); thread.start(); thread.join()\n"
        "assert said\n"
        "threading.Thread(target=threading.Event().wait).start()"
    ).finished


@pytest.mark.slow
def test_memory_is_limited_however_it_is_taken() -> None:
    assert "MemoryError" in ran("x = bytearray(600 << 20)").output
    bits = ran("x = []\nwhile True: x.append(bytearray(1 << 20))", memory_mb=128)
    assert "MemoryError" in bits.output
    assert "not permitted" in ran("import os; os.memfd_create('x')").output
    shared = "import ctypes; assert ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600) >= 0"
    assert not ran(shared).finished


def test_the_disk_cannot_be_filled() -> None:
    assert "File too large" in ran("open('x', 'wb').write(bytes(17 << 20))").output
    many = "for i in range(9): open(str(i), 'wb').write(bytes(15 << 20))"
    assert "No space left" in ran(many).output


def test_what_is_printed_is_limited() -> None:
    end = ran("while True: print('x' * 1000)")
    assert not end.finished
    assert end.output.startswith("xxx")
    assert len(end.output) == 1 << 16


def test_open_files_are_limited() -> None:
    program = "x = []\nwhile True: x.append(open('/dev/null'))"
    assert "Too many open files" in ran(program).output


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import os, signal\nfor s in (1, 2, 15, 24): signal.signal(s, signal.SIG_IGN)\n"
        "os.closerange(0, 64)\nwhile True: pass",
    ],
    ids=["plainly", "deaf and closed"],
)
def test_a_program_that_loops_is_killed_and_leaves_nothing(program: str, mark: int) -> None:
    assert not ran(program, 0.5, mark).finished
    assert gone(mark)


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        "import time; time.sleep(60)",
        "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
        "import os\nos.closerange(0, 64)\nimport time; time.sleep(60)",
        "import threading\nfor i in range(50): threading.Thread(target=lambda: 9 ** 9 ** 9).start()"
        "\nimport time; time.sleep(60)",
    ],
    ids=["sleeping", "stopped", "closed", "threads"],
)
def test_a_program_that_waits_is_killed_and_leaves_nothing(program: str, mark: int) -> None:
    assert not ran(program, 1, mark).finished
    assert gone(mark)


@pytest.mark.parametrize("target", ["1", "os.getppid()", "-1", "0"])
def test_a_program_that_kills_around_hits_nobody_else(target: str, mark: int) -> None:
    survivor = subprocess.Popen(["sleep", "60"])
    try:
        ran(f"import os; os.kill({target}, 9)", memory_mb=mark)
        assert gone(mark)
        assert survivor.poll() is None
    finally:
        survivor.kill()
        survivor.wait()


def test_a_run_leaves_no_descriptors() -> None:
    ran("")
    before = set(os.listdir("/proc/self/fd"))
    ran("1 / 0")
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_program_dies_with_whoever_runs_it(mark: int) -> None:
    code = f"from evomerge.fitness import sandbox; sandbox.run('while True: pass', 60, {mark})"
    conductor = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while len(processes(mark)) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(processes(mark)) == 3  # bubblewrap, the first process inside, the program
    finally:
        conductor.send_signal(signal.SIGKILL)
        conductor.wait()
    assert gone(mark)


def test_without_bubblewrap_nothing_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NoSandbox, match=r"bubblewrap is not installed \(apt install bubblewrap\)"):
        ran(f"open({str(tmp_path / 'x')!r}, 'w')")
    with pytest.raises(NoSandbox):
        sandbox.check()
    assert not list(tmp_path.iterdir())


def test_a_bubblewrap_that_is_refused_its_namespaces_is_no_sandbox(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'bwrap: No permissions' >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoSandbox, match="does not work here: bwrap: No permissions"):
        ran("")


def test_a_bubblewrap_that_cannot_be_started_is_no_sandbox(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "bwrap").write_bytes(b"\0 no program")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoSandbox, match="cannot be started"):
        ran("")


def system_python_of_nobody() -> str | None:
    """Why another user cannot run the sandbox in this test; None if one can."""
    if os.getuid() != 0:
        return "only root can become another user"
    if not Path("/usr/bin/python3").exists():
        return "no Python that any user may run"
    return None


@pytest.mark.skipif(system_python_of_nobody() is not None, reason=str(system_python_of_nobody()))
def test_root_is_not_needed() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from evomerge.fitness import sandbox\n"
        "print(sandbox.run('print(1)', 5, 512))\n"
        "print(sandbox.run('import os; os.fork()', 5, 512).finished)"
    )
    nobody = pwd.getpwnam("nobody")
    end = subprocess.run(
        ["/usr/bin/python3", "-B", "-c", code],
        user=nobody.pw_uid,
        group=nobody.pw_gid,
        extra_groups=[],
        cwd="/",
        capture_output=True,
        text=True,
    )
    assert end.stdout == "Ran(finished=True, output='1\\n')\nFalse\n", end.stderr
