"""Mathematics that is equal however it is written; expressions that never end."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from evomerge.fitness.example import Example
from evomerge.fitness.graders.equivalence import MathEquivalence
from evomerge.fitness.graders.grader import Grade
from tests.tiny import ROOT

GRADER = MathEquivalence()
HASTY = MathEquivalence(seconds=0.5)


def grade(target: str, reply: str, grader: MathEquivalence = GRADER) -> Grade:
    return grader.grades([(reply, Example("", target))])[0]


@pytest.mark.parametrize(
    ("target", "reply"),
    [
        ("1/2", "0.5"),
        (r"\frac{1}{2}", "1/2"),
        (r"\frac12", "The answer is 0.5."),
        (r"$\frac{3}{4}$", r"So the result is $\boxed{\frac{6}{8}}$."),
        (r"\boxed{7}", "7"),
        (r"The solution gives \boxed{7}", r"\boxed{7}"),
        ("3", "x=3"),
        ("3", "$x = 3$"),
        ("x=3", r"\boxed{3}"),
        ("1,000", "1000"),
        (r"\$18", r"\boxed{\$18}"),
        ("-3", "−3"),
        (r"50\%", "0.5"),
        ("50%", r"\boxed{50\%}"),
        (r"90^\circ", r"\boxed{90}"),
        (r"2\sqrt{3}", r"$\sqrt{12}$"),
        ("x^2+2x+1", "$(x+1)^2$"),
        (r"\{1,2\}", r"\boxed{\{2,1\}}"),
        ("1,2", r"\boxed{2,1}"),
        ("[0,1)", "$[0,1)$"),
        (r"x \le 3", r"$\boxed{(-\infty,3]}$"),
        (r"\left(3,\frac{\pi}{2}\right)", r"$\boxed{(3,\pi/2)}$"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"$\begin{pmatrix}1\\2\end{pmatrix}$"),
        ("6 - 5i", r"\boxed{-5i+6}"),
        (r"\text{Evelyn}", r"It is \boxed{\text{Evelyn}}."),
        (r"\text{(C)}", r"\boxed{C}"),
        ("no formula", "no formula"),
    ],
)
def test_equal_mathematics_is_right(target: str, reply: str) -> None:
    assert grade(target, reply) == Grade(1)


@pytest.mark.parametrize(
    ("target", "reply"),
    [
        ("1/2", "0.51"),
        ("3", "-3"),
        (r"\pi", "3.14159"),
        (r"2\sqrt{3}", "2"),
        ("6-5i", "5"),
        (r"x \le 3", "3"),
        ("[0,1)", "$[0,1]$"),
        ("(0,1)", "$(1,0)$"),
        (r"\{1,2\}", r"\boxed{1}"),
        ("11", r"It may be 11, but \boxed{12} is right."),
        ("5", "five"),
        ("5", ""),
        (r"\text{Evelyn}", r"\boxed{\text{Carla}}"),
    ],
)
def test_other_mathematics_is_wrong(target: str, reply: str) -> None:
    assert grade(target, reply) == Grade(0)


def test_a_target_that_is_no_mathematics_fails_that_item() -> None:
    found = GRADER.grades([("3", Example("", "")), ("3", Example("", "3"))])
    assert found == [
        Grade(0, "math_equivalence: the target is no mathematics: ''"),
        Grade(1),
    ]


@pytest.mark.slow
def test_an_expression_that_never_ends_fails_and_the_next_one_is_answered() -> None:
    reply = r"\boxed{10000000!}"
    reason = "math_equivalence: it took more than 0.5 s of processor time"
    assert grade("3", reply, HASTY) == Grade(0, reason)
    assert grade("3", "3.0", HASTY) == Grade(1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "reply",
    [
        r"\boxed{" + "(" * 5000 + "3" + ")" * 5000 + "}",
        "$" + "{" * 20000,
        "1" * 100000,
        r"\boxed{" * 3000,
        r"\boxed{\sum_{n=1}^{10^{9}} \sin(n)^{n}}",
        r"\boxed{\binom{100000000}{50000000}}",
        r"\boxed{9^{9^{9^{9}}}}",
        "9**9**9**9",
        "9**" * 5000,
    ],
)
def test_hostile_replies_are_worth_nothing_and_harm_nobody(reply: str) -> None:
    assert grade("3", reply, HASTY).worth == 0
    assert HASTY.vote(reply, Example("", "")) != "3"
    assert grade("3", "3.0", HASTY) == Grade(1)


@pytest.mark.parametrize(
    ("reply", "vote"),
    [
        ("So it is 7.", "7"),
        (r"\boxed{7.0}", "7"),
        (r"\frac{1}{2}", "0.500000000000"),
        ("0.5", "0.500000000000"),
        ("$x = 3$", "3"),
        (r"\boxed{123456789012345678}", "123456789012345678"),
        (r"\boxed{2x+x}", "3.0*x"),
        ("$3x$", "3.0*x"),
        (r"\boxed{\{2,1\}}", "{1.0, 2.0}"),
        (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", "Matrix([[1.00000000000], [2.00000000000]])"),
        (r"\boxed{\text{Carla}}", "carla"),
        (r"\boxed{\infty}", "oo"),
        ("I do not know", None),
    ],
)
def test_replies_that_agree_vote_alike(reply: str, vote: str | None) -> None:
    assert GRADER.vote(reply, Example("", "")) == vote


def test_threads_take_turns() -> None:
    pairs = [(str(n), f"{n}.0" if n % 2 else f"{n}.5") for n in range(1, 41)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda pair: grade(*pair).worth, pairs))
    assert found == [n % 2 for n in range(1, 41)]


def worker(mark: str) -> int | None:
    """The process that reads mathematics, with that in its environment."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"math_process.py" in path.read_bytes() and mark.encode() in (
                path.with_name("environ").read_bytes()
            ):
                return int(path.parent.name)
        except OSError:
            continue
    return None


@pytest.mark.slow
@pytest.mark.parametrize(
    "end",
    [
        pytest.param("", id="as it should"),
        pytest.param("os.kill(os.getpid(), 9)", id="killed", marks=pytest.mark.slow),
    ],
)
def test_the_process_ends_with_the_one_that_asked(end: str) -> None:
    mark = f"mark-{os.getpid()}-{len(end)}"
    code = (
        "import os\n"
        "from evomerge.fitness.example import Example\n"
        "from evomerge.fitness.graders.equivalence import MathEquivalence\n"
        "print(MathEquivalence().worth('0.5', Example('', '1/2')), flush=True)\n"
        f"{end}"
    )
    asked = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env={**os.environ, "MARK": mark},
        capture_output=True,
        text=True,
    )
    assert (asked.stdout, asked.stderr) == ("1.0\n", "")
    deadline = time.monotonic() + 10
    while worker(mark) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not worker(mark)


@pytest.mark.slow
def test_a_process_that_died_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    mark = f"mark-{os.getpid()}"
    monkeypatch.setenv("MARK", mark)
    grade("3", r"\boxed{10000000!}", HASTY)  # which ends the process, so that the next has the mark
    assert grade("1/2", "0.5") == Grade(1)
    pid = worker(mark)
    assert pid
    os.kill(pid, signal.SIGKILL)
    while Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z":
        time.sleep(0.01)
    assert grade("1/2", "0.5") == Grade(1)
    assert worker(mark) not in (None, pid)
