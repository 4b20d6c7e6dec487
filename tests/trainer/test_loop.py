"""Runs against a real server: what they leave, what they survive, and that they can be repeated."""

from __future__ import annotations

import math
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from helpers import toys
from helpers.paths import TESTS
from helpers.reference import TINY_FLAGS, Reference
from helpers.serving import expected_temperatures
from helpers.toys import Letters
from helpers.waiting import wait_for
from rich.console import Console
from safetensors.torch import load_file
from scipy import stats

from ead_cli.train import RemoteServer
from ead_client import Client
from ead_server.launch.process import ServerProcess, hold_port
from trainer_bridge.errors import BadConfig, StaleRollout, TooFewRollouts
from trainer_bridge.policy.batch import RolloutBatch, Sample
from trainer_bridge.policy.policy import ModelConfig, load_policy
from trainer_bridge.policy.trainer import ScoredAnswers, Trainer
from trainer_bridge.run import checkpoint
from trainer_bridge.run.collect import Collector, RolloutConfig
from trainer_bridge.run.config import read_config
from trainer_bridge.run.loop import train
from trainer_bridge.run.report import Display, read_metrics
from trainer_bridge.run.versions import Versions
from trainer_bridge.tasks.reward_runner import RewardRunner
from trainer_bridge.tasks.rewards import RewardConfig

VERSIONS = Versions("test")
SCHEDULE = {"tau_max": 1.5, "tau_min": 0.3, "decay": 20.0, "warmup": 3}


def settings(model: Path, *more: str) -> list[str]:
    """A run of seconds, whose every number depends on its seed alone."""
    return [
        f"model.path={model}",
        "task.kind=helpers.toys:Letters",
        "steps=4",
        "rollout.seeded=true",
        "rollout.prompts_per_step=3",
        "rollout.samples_per_prompt=4",
        "rollout.max_new_tokens=12",
        "rollout.annealing={tau_max=1.5, tau_min=0.3, decay=20.0, warmup=3}",
        "optimizer.learning_rate=1e-3",
        "update.tokens_per_forward=400",
        "reward.workers=1",
        "checkpoint.every=1",
        "report.tensorboard=false",
        *more,
    ]


LEARNING = (
    "rollout.prompts_per_step=8",
    "rollout.samples_per_prompt=8",
    "optimizer.learning_rate=3e-3",
    "checkpoint.every=40",
    "update.tokens_per_forward=4000",
)


@pytest.fixture
def go(
    client: Client, tiny_model: Path, tmp_path: Path
) -> Iterator[Callable[..., list[dict[str, Any]]]]:
    """Run something to its end on the shared server, which gets its first weights back."""

    def run(*more: str, folder: Path = tmp_path / "run", resume: bool = False) -> Any:
        config = read_config(settings(tiny_model, *more))
        with Display(Console(stderr=True), config.steps) as display:
            train(config, folder, RemoteServer(client, 60), display, resume=resume)
        return read_metrics(folder)

    run.model = tiny_model  # type: ignore[attr-defined]
    yield run
    original = {"model_path": str(tiny_model), "weight_version": "default"}
    client.request("POST", "/update_weights_from_disk", original, admin=True)


def repeatable(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without what depends on the clock."""
    return [
        {name: v for name, v in entry.items() if not name.startswith(("time/", "sync/"))}
        for entry in entries
    ]


def test_a_run_leaves_its_metrics_samples_curves_and_the_model_that_is_served(
    go: Any, client: Client, tmp_path: Path
) -> None:
    entries = go()
    assert [entry["step"] for entry in entries] == [0, 1, 2, 3]
    assert all(entry["policy/mismatch"] < 1e-4 for entry in entries)  # trainer and server agree
    assert all(entry["rollout/answers"] == 12 for entry in entries)
    folder = tmp_path / "run"
    for name in ("config.json", "versions.json", "curves.png", "samples/step-000003.jsonl"):
        assert (folder / name).stat().st_size > 0
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == [
        "step-000003",
        "step-000004",
    ]
    (_, step) = client.model_info()["weight_version"].split(":")
    assert step == "4"
    saved, tokenizer = load_policy(ModelConfig(path=str(folder / "model")), "cpu")
    ids = tokenizer("def ")["input_ids"]
    sampled = client.complete(ids, rollout=True, max_tokens=16, ignore_eos=True).choices[0].rollout
    assert sampled is not None
    with torch.no_grad():
        want = saved(RolloutBatch.build([Sample.of(sampled)])).logprobs
    assert np.abs(sampled.model_logprobs - want.numpy()).max() < 1e-4


@pytest.mark.parametrize(
    "annealing", ["{tau_max=1.2, tau_min=0.3, decay=16.0}", "{schedule='constant'}"]
)
def test_it_learns(annealing: str, go: Any, tmp_path: Path) -> None:
    """The reward of a random model's answers rises: the exact Mann-Whitney test over the means of
    the first and of the last eight steps of two seeds (ranks: how far each seed gets does not
    matter), which passes by chance once in a million runs."""
    first, last = [], []
    for seed in (0, 1):
        folder = tmp_path / f"run{seed}"
        more = (f"seed={seed}", "steps=40", f"rollout.annealing={annealing}", *LEARNING)
        rewards = [entry["reward/mean"] for entry in go(*more, folder=folder)]
        first += rewards[:8]
        last += rewards[-8:]
    assert stats.mannwhitneyu(last, first, alternative="greater", method="exact").pvalue < 1e-6


def test_a_run_is_evaluated_with_the_weights_and_the_clock_of_its_step(
    go: Any, tmp_path: Path
) -> None:
    """Every second step and after the last, beside answers that are generated ahead."""
    asked = ("evaluation.problems=2", "evaluation.n=2", "evaluation.annealing={preset='paper'}")
    entries = go("steps=3", "evaluate_every=2", "rollout.staleness=1", *asked)
    assert [entry["step"] for entry in entries if "eval/failed" in entry] == [1, 2]
    assert all(entry["eval/failed"] == 0 for entry in entries[1:])
    assert all("policy/drift" in entry for entry in entries[1:])


def test_adapters_are_trained_and_travel_alone(go: Any, client: Client, tmp_path: Path) -> None:
    entries = go("steps=2", "model.lora={rank=4}", "optimizer.learning_rate=0.02")
    whole = go("steps=1", folder=tmp_path / "whole")
    assert all(entry["policy/mismatch"] < 1e-4 for entry in entries)
    assert entries[1]["sync/bytes"] < whole[0]["sync/bytes"] / 4
    assert "sync/merge" in entries[1]
    before, after = (
        load_policy(ModelConfig(path=str(path)), "cpu")[0].state_dict()
        for path in (go.model, tmp_path / "run" / "model")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.endswith("_proj.weight") for name in changed)


def test_a_folder_that_holds_a_run_is_not_begun_again(go: Any) -> None:
    go("steps=1")
    with pytest.raises(BadConfig, match="already holds a run"):
        go("steps=1")
    with pytest.raises(BadConfig, match=r"'annealed' trains the policy \(tempered\)"):
        go("steps=2", "correction.kind=annealed", resume=True)


# --- repeated, resumed, cut up -------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(
    client: Client, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a run of four steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    config = read_config(settings(tiny_model))
    with Display(Console(stderr=True), config.steps) as display:
        train(config, folder, RemoteServer(client, 60), display)
    return folder


def assert_same_run(got: Path, want: Path, model: Path) -> None:
    """Metrics of every step, and the weights that it ended with.

    How answers are batched changes the last digits of float32 numbers, and Adam makes whole steps
    of the smallest gradients: a gradient of about 0 may move its weight by 1e-3 the other way,
    which is 2e-3 of the way here. A few of these are allowed. A lost step, or an optimizer that
    forgot its moments, is off by more than a tenth of the way.
    """
    entries = [repeatable(read_metrics(folder)) for folder in (got, want)]
    assert len(entries[0]) == len(entries[1]) == 4
    for ours, theirs in zip(*entries, strict=True):
        assert ours == pytest.approx(theirs, rel=5e-3, abs=1e-4)
    first, ours, theirs = (
        load_file(folder / "model.safetensors") for folder in (model, got / "model", want / "model")
    )
    assert first.keys() == ours.keys() == theirs.keys()
    off = math.sqrt(sum(float((ours[n] - theirs[n]).square().sum()) for n in first))
    way = math.sqrt(sum(float((theirs[n] - first[n]).square().sum()) for n in first))
    assert off < 5e-3 * way  # 6e-6 to 2e-4 are measured


# beside an evaluation at other temperatures, for all of it see benchmarks.interrupted
AHEAD = ("rollout.staleness=1", "evaluate_every=1", "evaluation={problems=2, n=2, temperature=0.0}")


@pytest.mark.parametrize(
    ("where", "more"), [("update", ()), ("checkpoint", ()), ("sync", ()), ("update", AHEAD)]
)
def test_a_run_killed_anywhere_goes_on_as_if_it_had_not_been(
    where: str,
    more: tuple[str, ...],
    go: Any,
    uninterrupted: Path,
    server: ServerProcess,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    if more:
        go(*more, folder=tmp_path / "whole")
        uninterrupted = tmp_path / "whole"
    script = TESTS / "helpers" / "killed_run.py"
    command = [sys.executable, str(script), where, server.url, str(folder)]
    command += settings(tiny_model, *more)
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environ = {**os.environ, "EAD_ADMIN_API_KEY": server.admin_api_key, "PYTHONPATH": path}
    killed = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert 0 < len(read_metrics(folder)) < 4
    go(*more, folder=folder, resume=True)
    assert_same_run(folder, uninterrupted, tiny_model)
    assert not list((folder / "checkpoints").glob("*.partial"))


def test_two_processes_run_as_one_does(
    uninterrupted: Path, server: ServerProcess, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "ead_cli.main", "train", "--folder", str(folder)]
    command += settings(tiny_model, f"server.url={server.url}", "sync.transport=distributed")
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environ = {
        **os.environ,
        "EAD_ADMIN_API_KEY": server.admin_api_key,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path,
    }
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_same_run(folder, uninterrupted, tiny_model)


def test_server_and_trainer_killed_and_the_run_goes_on(
    uninterrupted: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """`ead train` with a server of its own: the scheduler is killed after the first step, and comes
    back; the trainer after the second, and its server ends too; the run is resumed."""
    folder = tmp_path / "run"
    flags = ", ".join(f'"{flag}"' for flag in TINY_FLAGS)
    command = [sys.executable, "-m", "ead_cli.main", "train", "--folder", str(folder)]
    command += settings(tiny_model, f"server.arguments=[{flags}]")
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environ = {**os.environ, "PYTHONPATH": path}
    first = subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    family: list[psutil.Process] = []
    try:
        assert first.stdout is not None
        lines = []
        for line in first.stdout:
            lines.append(line)
            if line.startswith("step 1/4"):
                family = psutil.Process(first.pid).children(recursive=True)
                schedulers = [child for child in family if "scheduler" in child.name()]
                assert schedulers
                for scheduler in schedulers:
                    scheduler.kill()
            if line.startswith("step 2/4"):
                family = psutil.Process(first.pid).children(recursive=True)
                first.kill()
        assert first.wait(60) == -signal.SIGKILL, "".join(lines)
        assert any("waiting for the server" in line for line in lines), "".join(lines)
        assert len(family) > 3
        assert not psutil.wait_procs(family, timeout=60)[1]  # nothing is left running
    finally:
        if first.poll() is None:
            first.kill()
    second = subprocess.run(
        [*command, "--resume"], env=environ, capture_output=True, text=True, timeout=300
    )
    assert second.returncode == 0, second.stdout + second.stderr
    assert_same_run(folder, uninterrupted, tiny_model)


# --- stopped by Ctrl-C ---------------------------------------------------------------------------


def begun(ranks: int, *arguments: str, server: ServerProcess) -> list[subprocess.Popen[str]]:
    """`ead train` with a server that runs, as the ranks that torchrun would start."""
    environ = {
        **os.environ,
        "EAD_ADMIN_API_KEY": server.admin_api_key,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
    }
    if ranks > 1:
        with hold_port("127.0.0.1") as held:
            port = held.getsockname()[1]
        environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "ead_cli.main", "train", *arguments],
            env={**environ, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]


def read_until(process: subprocess.Popen[str], beginning: str) -> str:
    """What it prints, up to the line that begins so."""
    said = ""
    assert process.stdout is not None
    for line in process.stdout:
        said += line
        if line.startswith(beginning):
            return said
    raise AssertionError(f"no line begins with {beginning!r}:\n{said}")


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_first_ctrl_c_finishes_the_step_and_the_run_can_be_resumed(
    ranks: int,
    go: Any,
    uninterrupted: Path,
    server: ServerProcess,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    asked = settings(tiny_model, f"server.url={server.url}", "checkpoint.every=0")
    processes = begun(ranks, *asked, "--folder", str(folder), server=server)
    try:
        read_until(processes[0], "step 1/4")
        for process in processes:  # as a terminal sends it
            process.send_signal(signal.SIGINT)
        said = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [130] * ranks, said
    (finishing,) = re.findall(
        r"^finishing step (\d), writing a checkpoint; press again to stop now$", said[0], re.M
    )
    assert re.search(
        rf"^ead: stopped by Ctrl-C after step {finishing}; go on with.* --resume", said[0], re.M
    )
    assert not any("ead:" in other or "finishing" in other for other in said[1:])
    assert not any("Traceback" in one for one in said)
    done = int(finishing)
    assert [entry["step"] for entry in read_metrics(folder)] == [*range(done)]
    (saved,) = (folder / "checkpoints").iterdir()
    assert saved.name == f"step-{done:06d}"
    if ranks == 1:
        go("checkpoint.every=0", folder=folder, resume=True)
        assert_same_run(folder, uninterrupted, tiny_model)


def test_a_second_ctrl_c_stops_at_once(
    server: ServerProcess, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEING_SCORED", str(tmp_path / "scoring"))
    never = ("task.kind=helpers.toys:NeverScored", "reward.timeout_s=1000")
    asked = settings(tiny_model, f"server.url={server.url}", *never)
    (process,) = begun(1, *asked, "--folder", str(tmp_path / "run"), server=server)
    try:
        read_until(process, "letters: run")
        wait_for((tmp_path / "scoring").exists)
        process.send_signal(signal.SIGINT)
        read_until(process, "finishing step 1, writing a checkpoint; press again to stop now")
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "ead: stopped by Ctrl-C; go on with: ead train" in said
    assert "Traceback" not in said


# --- pipelined -----------------------------------------------------------------------------------


def test_answers_generated_ahead_are_as_stale_as_allowed_and_trained_on_as_what_they_are(
    go: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update gets each token with the numbers of the weights that it was sampled from, and says
    how far its own have gone since."""
    updates: list[tuple[dict[str, torch.Tensor], ScoredAnswers, dict[str, float]]] = []
    update = Trainer.update

    def watched(trainer: Trainer, answers: ScoredAnswers) -> dict[str, float]:
        weights = {name: w.clone() for name, w in trainer.policy.named_weights()}
        updates.append((weights, answers, update(trainer, answers)))
        return updates[-1][2]

    monkeypatch.setattr(Trainer, "update", watched)
    entries = go("rollout.staleness=1", "rollout.max_new_tokens=40", "steps=5")
    staleness = [entry["rollout/staleness"] for entry in entries]
    assert staleness[0] == 0
    assert all(0 <= value <= 1 for value in staleness)
    assert sum(staleness) > 1  # begun before the update that they waited for

    model = Reference(go.model)

    @torch.no_grad()
    def logprobs(step: int, sample: Sample) -> np.ndarray:
        """Of the weights that the update of `step` begins with."""
        model.model.load_state_dict(updates[step][0])
        answer = sample.token_ids[sample.prompt_length :]
        rows = model.logits(sample.token_ids[: sample.prompt_length], answer).log_softmax(-1)
        return rows.gather(1, torch.from_numpy(answer)[:, None]).squeeze(1).numpy()

    drifted = 0
    for step, (_, answers, metrics) in enumerate(updates):
        drifts = []
        assert len(answers.behind) == len(answers.samples)
        for sample, behind in zip(answers.samples, answers.behind, strict=True):
            now = logprobs(step, sample)
            then = logprobs(step - behind, sample)
            gaps = np.minimum(abs(sample.model_logprobs - now), abs(sample.model_logprobs - then))
            assert gaps.max() < 1e-4
            assert abs(sample.model_logprobs - then)[0] < 1e-4  # its oldest token
            drifts += list(abs(sample.model_logprobs - now)) if behind else []
        if drifts:
            drifted += 1
            assert metrics["policy/drift"] == pytest.approx(np.mean(drifts), rel=0.01)
            assert metrics["policy/drift"] > 1e-3
        assert metrics.get("policy/mismatch", 0) < 1e-4
    assert drifted


# --- what fails is dropped and counted -----------------------------------------------------------


@pytest.fixture
def collector(client: Client, tiny_model: Path) -> Iterator[Callable[..., Collector]]:
    """A collector of a toy task, on the weights of step 0."""
    from transformers import AutoTokenizer

    weights = {"model_path": str(tiny_model), "weight_version": VERSIONS.name(0)}
    client.request("POST", "/update_weights_from_disk", weights, admin=True)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    runners: list[RewardRunner] = []

    def make(task: Any, **config: Any) -> Collector:
        runners.append(RewardRunner(task.reward, RewardConfig(workers=1)))
        sized = {"prompts_per_step": 4, "samples_per_prompt": 4, "max_new_tokens": 12, **config}
        return Collector(
            RolloutConfig(annealing=SCHEDULE, **sized),
            client,
            task,
            runners[-1],
            tokenizer,
            VERSIONS,
        )

    yield make
    for runner in runners:
        runner.close()
    weights["weight_version"] = "default"
    client.request("POST", "/update_weights_from_disk", weights, admin=True)


def test_questions_that_fail_are_dropped_and_counted(collector: Any) -> None:
    collected = collector(toys.EverySecondTooLong()).collect(0, 0)
    assert set(collected.answers.group_ids) == {0, 2}
    assert collected.metrics["rollout/groups_failed"] == 2
    assert collected.metrics["rollout/answers_failed"] == 8
    assert collected.position == 4


def test_a_step_of_nothing_but_failures_is_an_error(collector: Any) -> None:
    with pytest.raises(TooFewRollouts, match="'answers_failed': 16"):
        collector(toys.AllTooLong()).collect(0, 0)


def test_answers_whose_reward_failed_are_dropped_and_counted(collector: Any) -> None:
    """A group of three loses two answers with a chance of 3 in 8, and then its last one too."""
    made = collector(toys.SometimesRaises(), prompts_per_step=32, samples_per_prompt=3)
    collected = made.collect(0, 0)
    failed = collected.metrics["rollout/rewards_raised"]
    alone = collected.metrics["rollout/answers_alone"]
    assert min(failed, alone) > 0
    assert len(collected.answers.samples) + failed + alone == 96
    assert all(len(text) % 2 for text in collected.texts)


def test_groups_that_teach_nothing_are_replaced(collector: Any) -> None:
    made = collector(toys.EverySecondTeachesNothing(), refills=3)
    collected = made.collect(0, 0)
    assert sorted(set(collected.answers.group_ids)) == [1, 3, 5, 7]
    assert collected.metrics["rollout/groups_without_signal"] == 4
    assert collected.position == 8


def test_too_long_an_answer_loses_reward_over_the_last_tokens(collector: Any) -> None:
    plain = collector(Letters(), seeded=True).collect(0, 0).answers
    short = collector(Letters(), seeded=True, overlong_buffer=10).collect(0, 0).answers
    for sample, before, after in zip(plain.samples, plain.rewards, short.rewards, strict=True):
        assert before - after == pytest.approx(max(0, sample.num_trained - 2) / 10)


def test_an_aborted_answer_goes_on_where_it_was(client: Client, collector: Any) -> None:
    made = collector(
        Letters(), prompts_per_step=1, max_new_tokens=400, sampling={"ignore_eos": True}
    )
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(made.collect(0, 0)))
    thread.start()
    while client.request("GET", "/v1/loads").json()["loads"][0]["num_running_reqs"] < 4:
        assert thread.is_alive()
    client.request("POST", "/abort_request", {"abort_all": True}, admin=True)
    thread.join()
    (collected,) = results
    assert collected.metrics["rollout/continued"] >= 1
    for sample in collected.answers.samples:
        assert sample.num_trained == 400
        want = expected_temperatures(SCHEDULE, 400)
        assert np.abs(sample.temperatures - want).max() < 1e-6


def test_answers_from_other_weights_are_refused(client: Client, collector: Any) -> None:
    with pytest.raises(StaleRollout, match="step 3 wants weights of version 3, an answer came"):
        collector(Letters()).collect(3, 0)


# --- a disk that is full -------------------------------------------------------------------------


def test_a_checkpoint_that_cannot_be_written_is_tried_again(
    go: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The operating system refuses files of more than 1000 bytes while the first is written."""
    saver, calls = checkpoint.state_dict_saver, []
    save = saver.save

    def cramped(*arguments: Any, **keys: Any) -> Any:
        calls.append(1)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if len(calls) == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            return save(*arguments, **keys)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(saver, "save", cramped)
    entries = go("checkpoint.every=2", "checkpoint.keep=9")
    assert [entry["checkpoint/failed"] for entry in entries] == [0, 1, 0, 0]
    checkpoints = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert checkpoints == ["step-000003", "step-000004"]  # nothing half written is left
    assert "trying again" in capsys.readouterr().err
