"""Reward functions in worker processes: what they return, and what their failures cost.

The functions stand at the top of this module, since workers import it.
"""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import os
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer_bridge.errors import RewardFunctionUnusable
from trainer_bridge.tasks.reward_runner import RewardRunner
from trainer_bridge.tasks.rewards import (
    Async,
    Batched,
    Outcome,
    RewardConfig,
    RewardFailure,
    RewardFunction,
)

PATIENCE_S = 120  # of a test, for what must happen


def score(runner: RewardRunner, problem: Any, answers: Sequence[str]) -> list[Outcome]:
    return runner.submit(problem, answers).result(PATIENCE_S)


def kinds(outcomes: Sequence[Outcome]) -> list[str | float]:
    return [o.kind if isinstance(o, RewardFailure) else o for o in outcomes]


# --- reward functions ----------------------------------------------------------------------------


def weighted_length(problem: float, answer: str) -> float:
    return problem * len(answer)


def weighted_lengths(problems: Sequence[float], answers: Sequence[str]) -> list[float]:
    return [problem * len(answer) for problem, answer in zip(problems, answers, strict=True)]


async def weighted_length_later(problem: float, answer: str) -> float:
    await asyncio.sleep(0)
    return problem * len(answer)


class NotPicklable(Exception):
    def __reduce__(self) -> Any:
        raise TypeError("not me")


def behave(problem: Any, answer: str) -> Any:
    """Does as the answer says."""
    if answer == "raise":
        raise KeyError("no such key")
    if answer == "raise what cannot be pickled":
        raise NotPicklable("stay here")
    if answer == "sys.exit":
        sys.exit(1)
    if answer == "os._exit":
        os._exit(3)
    if answer == "segfault":
        ctypes.string_at(0)
    if answer == "be killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if answer == "loop":
        while True:
            pass
    if answer == "loop in C":
        re.match(r"(a+)+$", "a" * 64 + "b")  # never gives the interpreter's lock back
    if answer == "take all memory":
        bytearray(2**40)
    if answer.startswith("numpy "):
        return eval(answer[6:], {"np": np})
    values = {
        "huge": 1e300,
        "large": -1e20,
        "number": 1e14,
        "nan": float("nan"),
        "inf": float("-inf"),
        "none": None,
        "text": "1.0",
        "list": [1.0],
    }
    return values.get(answer, 1.0)


def behave_all(problems: Sequence[Any], answers: Sequence[str]) -> list[Any]:
    if "one too few" in answers:
        return [1.0] * (len(answers) - 1)
    return [behave(problem, answer) for problem, answer in zip(problems, answers, strict=True)]


def behave_in_a_shape(problems: Sequence[Any], answers: Sequence[str]) -> Any:
    """All rewards are 1, in what the first answer says."""
    shapes: dict[str, Any] = {
        "mapping": dict.fromkeys([1.0, 2.0], "by answer"),
        "keys": {1.0: "a", 2.0: "b"}.keys(),
        "set": {1.0, 2.0},
        "text": "11",
        "bytes": b"11",
        "table": np.ones((2, 2)),
        "scalar": np.array(1.0),
        "iterator": iter([1.0, 1.0]),
        "array": np.ones(2),
        "values": {"a": 1.0, "b": 1.0}.values(),
    }
    return shapes[answers[0]]


async def behave_later(problem: Any, answer: str) -> Any:
    if answer == "hang":
        await asyncio.Event().wait()
    if answer == "a timeout of its own":
        async with asyncio.timeout(0):
            await asyncio.Event().wait()
    return behave(problem, answer)


def wait_for_writer(problem: str, answer: str) -> float:
    """Returns when the pipe that is named `problem` has been opened for writing."""
    if answer == "wait":
        with open(problem):
            pass
    return 1.0


def about_the_worker(problem: None, answer: str) -> float:
    if answer == "torch":
        return float("torch" in sys.modules)
    if answer == "gpu":
        return float(os.environ["CUDA_VISIBLE_DEVICES"] != "")
    return float(os.getpid())


def hang_with_a_child(problem: str, answer: str) -> float:
    """Starts a process that writes its id to the pipe `problem`, and waits for it for ever."""
    child = multiprocessing.Process(target=_tell_and_hang, args=(problem,))
    child.start()
    child.join()
    return 1.0


def _tell_and_hang(pipe: str) -> None:
    with open(pipe, "w") as file:
        file.write(str(os.getpid()))
    signal.pause()


# --- what comes back -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reward",
    [
        weighted_length,
        Batched(weighted_lengths),
        Batched(weighted_lengths, size=2),
        Async(weighted_length_later),
        Async(weighted_length_later, size=2),
    ],
)
def test_every_form_scores_every_answer_in_order(reward: RewardFunction) -> None:
    answers = ["", "a", "bb", "ccc", "d" * 1000]
    with RewardRunner(reward, RewardConfig(workers=2)) as runner:
        futures = [runner.submit(weight, answers) for weight in (1.0, 0.5, -2.0)]
        got = [future.result(PATIENCE_S) for future in futures]
        assert runner.submit(1.0, []).result(0) == []
    assert got == [[weight * len(answer) for answer in answers] for weight in (1.0, 0.5, -2.0)]


@pytest.fixture(scope="module")
def plain() -> Any:
    config = RewardConfig(workers=1, timeout_s=2, max_memory_gib=4)
    with RewardRunner(behave, config) as runner:
        yield runner


@pytest.mark.parametrize(
    ("misdeed", "kind", "message"),
    [
        ("raise", "raised", r"KeyError: 'no such key' \(.*test_rewards.py:\d+\)"),
        ("raise what cannot be pickled", "raised", "test_rewards.NotPicklable: stay here"),
        ("sys.exit", "raised", "SystemExit: 1"),
        ("os._exit", "crashed", "the worker ended with exit status 3"),
        ("segfault", "crashed", "the worker was killed by SIGSEGV"),
        ("be killed", "crashed", "the worker was killed by SIGKILL"),
        ("loop", "timed_out", "no reward within 2 s"),
        ("loop in C", "timed_out", "no reward within 2 s"),
        ("take all memory", "raised", "MemoryError"),
        ("nan", "not_finite", "nan is not a finite number"),
        ("inf", "not_finite", "-inf is not a finite number"),
        ("none", "not_finite", "None is not a finite number"),
        ("text", "not_finite", "'1.0' is not a finite number"),
        ("list", "not_finite", r"\[1.0\] is not a finite number"),
        ("huge", "not_finite", r"1e\+300 is not finite in float32"),
        ("large", "not_finite", r"-1e\+20 is not finite in float32"),
        ("numpy np.str_('3.0')", "not_finite", r".*'3.0'.* is not a finite number"),
        ("numpy np.bytes_(b'3.0')", "not_finite", r".*'3.0'.* is not a finite number"),
        ("numpy np.array('3.0')", "not_finite", r"array\('3.0'.* is not a finite number"),
        ("numpy np.array('3.0', dtype=object)", "not_finite", r"array\('3.0'.* is not a finite"),
        ("numpy np.timedelta64(3)", "not_finite", ".* is not a finite number"),
    ],
)
def test_a_failure_is_typed_and_costs_that_answer_alone(
    plain: RewardRunner, misdeed: str, kind: str, message: str
) -> None:
    first, failure, last = score(plain, None, ["good", misdeed, "good"])
    assert isinstance(failure, RewardFailure)
    assert failure.kind == kind
    assert re.match(message, failure.message), failure.message
    assert (first, last) == (1.0, 1.0)


def test_numbers_of_every_kind_are_rewards(plain: RewardRunner) -> None:
    numbers = ["number", "numpy np.float32(0.5)", "numpy np.int64(2)", "numpy np.bool_(True)"]
    assert score(plain, None, [*numbers, "numpy np.array(3)"]) == [1e14, 0.5, 2.0, 1.0, 3.0]


def test_many_crashes_in_a_row_are_all_told_and_the_rest_is_scored(plain: RewardRunner) -> None:
    outcomes = score(plain, None, ["os._exit", "good", "segfault"] * 6)
    assert kinds(outcomes) == ["crashed", 1.0, "crashed"] * 6


def test_a_failed_batch_costs_the_answers_of_its_call() -> None:
    config = RewardConfig(workers=1, timeout_s=2)
    with RewardRunner(Batched(behave_all, size=2), config) as runner:
        for misdeed, kind in [
            ("one too few", "wrong_count"),
            ("raise", "raised"),
            ("os._exit", "crashed"),
            ("loop", "timed_out"),
        ]:
            outcomes = score(runner, None, ["good", misdeed, "good", "good"])
            assert kinds(outcomes) == [kind, kind, 1.0, 1.0]
        assert kinds(score(runner, None, ["nan", "good"])) == ["not_finite", 1.0]
        few = score(runner, None, ["one too few", "good"])[0]
        assert few == RewardFailure("wrong_count", "1 rewards for 2 answers")


def test_a_batch_of_rewards_that_has_no_order_is_a_failure() -> None:
    """Of a mapping, the keys would be taken for rewards; of a table, the columns."""
    with RewardRunner(Batched(behave_in_a_shape, size=2), RewardConfig(workers=1)) as runner:
        for shape in ("mapping", "keys", "set", "text", "bytes", "table", "scalar"):
            assert kinds(score(runner, None, [shape, ""])) == ["not_finite"] * 2, shape
        for shape in ("iterator", "array", "values"):
            assert score(runner, None, [shape, ""]) == [1.0, 1.0], shape


def test_a_coroutine_that_hangs_times_out_alone_and_one_that_blocks_is_ended() -> None:
    with RewardRunner(Async(behave_later), RewardConfig(workers=1, timeout_s=2)) as runner:
        answers = ["good", "hang", "raise", "a timeout of its own", "sys.exit", "good"]
        expected = [1.0, "timed_out", "raised", "raised", "raised", 1.0]
        assert kinds(score(runner, None, answers)) == expected
        outcomes = score(runner, None, ["good", "loop"])
        assert kinds(outcomes) == [1.0, "timed_out"]  # what was told before is kept
        assert kinds(score(runner, None, ["good", "os._exit"])) == [1.0, "crashed"]
        assert score(runner, None, ["good"]) == [1.0]


def test_rewards_come_while_others_are_still_computed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with RewardRunner(wait_for_writer, RewardConfig(workers=2)) as runner:
        slow = runner.submit(str(tmp_path / "pipe"), ["wait"])
        assert score(runner, "", ["now"] * 20) == [1.0] * 20
        assert not slow.done()
        with open(tmp_path / "pipe", "w"):
            assert slow.result(PATIENCE_S) == [1.0]


# --- the queue, and the end ----------------------------------------------------------------------


def test_submit_blocks_while_too_many_answers_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with RewardRunner(wait_for_writer, RewardConfig(workers=1, max_waiting=2)) as runner:
        busy = runner.submit(str(tmp_path / "pipe"), ["wait"])
        with open(tmp_path / "pipe", "w"):  # opens when the worker has it open: it is busy now
            pass
        assert busy.result(PATIENCE_S) == [1.0]

        futures = [runner.submit(str(tmp_path / "pipe"), ["wait", "now", "now"])]
        thread = threading.Thread(target=lambda: futures.append(runner.submit("", ["now"])))
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
        with open(tmp_path / "pipe", "w"):
            pass
        thread.join(PATIENCE_S)
        assert [f.result(PATIENCE_S) for f in futures] == [[1.0, 1.0, 1.0], [1.0]]


def test_close_ends_the_workers_and_cancels_what_is_missing() -> None:
    runner = RewardRunner(behave, RewardConfig(workers=2))
    outcomes = score(runner, None, ["good"] * 10)
    futures = [runner.submit(None, ["loop", "good"]) for _ in range(5)]
    workers = multiprocessing.active_children()
    assert len(workers) >= 2
    runner.close()
    for future in futures:
        with pytest.raises(CancelledError):
            future.result(PATIENCE_S)
    assert outcomes == [1.0] * 10
    assert not any(worker.is_alive() for worker in workers)
    with pytest.raises(RuntimeError, match="closed"):
        runner.submit(None, ["good"])
    runner.close()  # again, harmless


def test_what_a_reward_function_started_ends_with_its_worker(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with RewardRunner(hang_with_a_child, RewardConfig(workers=1, timeout_s=2)) as runner:
        future = runner.submit(str(tmp_path / "pipe"), ["answer"])
        with open(tmp_path / "pipe") as file:
            child = int(file.read())
        assert kinds(future.result(PATIENCE_S)) == ["timed_out"]
        wait_for_end(child)


def test_workers_have_no_torch_and_see_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch  # the trainer has it

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with RewardRunner(about_the_worker, RewardConfig(workers=1)) as runner:
        has_torch, sees_gpu, pid = score(runner, None, ["torch", "gpu", "pid"])
    assert torch.__name__ in sys.modules
    assert (has_torch, sees_gpu) == (0.0, 0.0)
    assert pid != os.getpid()


SCRIPT = """
import os, re, signal, sys
from trainer_bridge.tasks.reward_runner import RewardRunner
from trainer_bridge.tasks.rewards import RewardConfig

def reward(problem, answer):
    os.write(1, b"%d\\n" % os.getpid())  # in one piece, whoever writes at the same time
    if answer == "loop":
        re.match(r"(a+)+$", "a" * 64 + "b")
    return len(answer)

if __name__ == "__main__":
    runner = RewardRunner(reward, RewardConfig(workers=2))
    assert runner.submit(None, ["a", "bb"]).result(60) == [1.0, 2.0]
    os.write(1, b"scored\\n")
    runner.submit(None, ["loop"])
    if sys.argv[1] == "wait":
        signal.pause()
"""


@pytest.mark.parametrize("ending", ["kill -9", "forgets to close"])
def test_no_worker_outlives_the_program_of_a_script_however_it_ends(
    tmp_path: Path, ending: str
) -> None:
    """One worker is idle, one in a loop in C that no signal handler or thread can interrupt."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    argument = "wait" if ending == "kill -9" else "go"
    command = [sys.executable, str(script), argument]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline().strip() for _ in range(3 if argument == "go" else 4)]
        assert "scored" in lines
        if ending == "kill -9":
            process.kill()
        process.wait(PATIENCE_S)
    for pid in {int(line) for line in lines if line != "scored"}:
        wait_for_end(pid)


def wait_for_end(pid: int) -> None:
    """Return when no process has this id any more, or it is a zombie that nobody waits for."""
    try:
        end = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    assert select.select([end], [], [], PATIENCE_S)[0], f"process {pid} is still there"
    os.close(end)


UNGUARDED = """
from trainer_bridge.tasks.reward_runner import RewardRunner
from trainer_bridge.tasks.rewards import RewardConfig

def reward(problem, answer):
    return 1.0

RewardRunner(reward, RewardConfig(workers=1, start_timeout_s=3600))
"""
LIMITED = """
import resource
from trainer_bridge.tasks.reward_runner import RewardRunner
from trainer_bridge.tasks.rewards import RewardConfig

def reward(problem, answer):
    return float(resource.getrlimit(resource.RLIMIT_AS)[1] // 2**20)

if __name__ == "__main__":
    for limits in ((4 * 2**30, 4 * 2**30), (3 * 2**30, 4 * 2**30)):
        resource.setrlimit(resource.RLIMIT_AS, limits)
        with RewardRunner(reward, RewardConfig(workers=1, max_memory_gib=8)) as runner:
            print(runner.submit(None, ["a"]).result(60))
"""


def run_script(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(text)
    command = [sys.executable, str(folder / "script.py")]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)


def test_a_script_without_a_main_guard_is_told_so_at_once(tmp_path: Path) -> None:
    """Not after start_timeout_s, in which its worker waited for a worker of its own."""
    ended = run_script(tmp_path, UNGUARDED)
    assert ended.returncode == 1
    assert 'except what stands under `if __name__ == "__main__":`' in ended.stderr


def test_a_limit_of_memory_that_is_lower_already_is_kept(tmp_path: Path) -> None:
    """As `ulimit -v` sets it: raising it is not allowed, and ended the workers."""
    ended = run_script(tmp_path, LIMITED)
    assert ended.stdout.split() == ["[4096.0]", "[3072.0]"], ended.stderr


# --- what cannot be run --------------------------------------------------------------------------


def test_functions_that_no_worker_could_run_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TypeError, match="cannot be sent to a worker process"):
        RewardRunner(lambda problem, answer: 1.0)
    with pytest.raises(TypeError, match="declare it as Async"):
        RewardRunner(weighted_length_later)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        RewardRunner(Batched(weighted_lengths, size=0))

    # a module that imports here, and in no other process
    (tmp_path / "only_here.py").write_text(
        f"import os\nassert os.getpid() == {os.getpid()}, 'not there'\ndef reward(p, a): return 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import only_here  # type: ignore[import-not-found]

    with pytest.raises(RewardFunctionUnusable, match="AssertionError: not there"):
        RewardRunner(only_here.reward, RewardConfig(workers=2))
    (tmp_path / "hangs.py").write_text("def reward(p, a): return 1\n")
    import hangs  # type: ignore[import-not-found]

    (tmp_path / "hangs.py").write_text("import signal\nsignal.pause()\n")
    with pytest.raises(RewardFunctionUnusable, match="was not ready after 3 s"):
        RewardRunner(hangs.reward, RewardConfig(workers=1, start_timeout_s=3))


def test_a_problem_that_a_worker_cannot_load_fails_its_own_answers_only() -> None:
    with RewardRunner(behave, RewardConfig(workers=1)) as runner:
        bad = runner.submit(LoadsNowhere(), ["good"])
        good = runner.submit(None, ["good"])
        assert kinds(bad.result(PATIENCE_S)) == ["raised"]
        assert good.result(PATIENCE_S) == [1.0]
        with pytest.raises(TypeError, match="not me"):
            runner.submit(NotPicklable(), ["good"])


class LoadsNowhere:
    def __reduce__(self) -> Any:
        return (int, ("not a number",))
