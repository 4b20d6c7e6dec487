"""What the commands write and print, and what they leave alone. No server."""

from __future__ import annotations

import io
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from ead_cli import bench, chat, demo, schedule, train
from ead_cli.main import app
from ead_client import Client
from ead_sampler import AnnealingError, defaults, parse_annealing
from ead_sampler.defaults import set_default_annealing
from ead_sampler.schedules import REGISTRY, Numbers, PositionSchedule, Temperature, register
from ead_server.annealing import preview
from ead_server.launch import models, serve
from ead_server.launch.process import ServerProcess
from ead_server.settings import read_key
from trainer_bridge import TrainConfig
from trainer_bridge.errors import BadConfig
from trainer_bridge.run.config import read_config
from trainer_bridge.run.report import Display, ReportConfig, RunFolder, check_folder, read_metrics

CONFIG = TrainConfig().model_dump(mode="json")


# --- the folder of a run -------------------------------------------------------------------------


def run_folder(path: Path, resumed_at: int = 0) -> RunFolder:
    return RunFolder(path, ReportConfig(tensorboard=False), CONFIG, resumed_at)


def test_a_run_without_a_checkpoint_is_not_begun_again(tmp_path: Path) -> None:
    check_folder(tmp_path, resume=False)
    folder = run_folder(tmp_path)
    check_folder(tmp_path, resume=False)  # it ended before its first step
    folder.metrics(0, {"reward/mean": 0.5})
    with pytest.raises(BadConfig, match="already holds a run"):
        check_folder(tmp_path, resume=False)
    check_folder(tmp_path, resume=True)
    assert len(read_metrics(tmp_path)) == 1


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_something_else_is_refused(resume: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(BadConfig, match=r"config\.json is not of a run"):
        check_folder(tmp_path, resume=resume)
    (tmp_path / "config.json").unlink()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("mine")
    with pytest.raises(BadConfig, match="already holds a run"):
        check_folder(tmp_path, resume=False)


def test_what_a_resumed_run_does_again_is_kept_aside(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    for step in range(4):
        folder.metrics(step, {"x": step, "odd\u2028": float("nan")})
    lines = (tmp_path / "metrics.jsonl").read_bytes().split(b"\n")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "x"')  # killed here
    run_folder(tmp_path, resumed_at=2)
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [0, 1]
    dropped = (tmp_path / "metrics.dropped.jsonl").read_bytes().split(b"\n")
    assert dropped == [*lines[2:4], b'{"step": 4, "x"', b""]
    run_folder(tmp_path, resumed_at=2)
    assert (tmp_path / "metrics.dropped.jsonl").read_bytes().split(b"\n") == dropped


def test_no_samples_are_no_lines(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, ReportConfig(samples=0, tensorboard=False), CONFIG, 0)
    folder.samples(0, [{"text": "x"}])
    assert (tmp_path / "samples" / "step-000000.jsonl").read_bytes() == b""


def test_the_demo_writes_over_nothing(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    (runs / "train").mkdir(parents=True)
    (runs / "train" / "metrics.jsonl").write_text("mine")
    assert demo._new_folder(runs) == tmp_path / "runs-2"
    (tmp_path / "runs-2" / "server.log").touch()
    assert demo._new_folder(runs) == tmp_path / "runs-3"
    assert demo._new_folder(runs) == tmp_path / "runs-3"  # empty
    assert demo._new_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    (tmp_path / "file").touch()
    assert demo._new_folder(tmp_path / "file") == tmp_path / "file-2"


def test_a_servers_log_is_added_to(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text("before\n")
    command = (sys.executable, "-c", "print('a\\u2028b'); raise SystemExit(3)")
    with ServerProcess([], log, command=command, environ={"PYTHONUTF8": "1"}) as process:
        process.process.wait(60)
        assert process.log_end() == "a\u2028b"
    assert log.read_text() == "before\na\u2028b\n"


# --- keys and settings ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "environ", "key"),
    [
        ([], {}, None),
        ([], {"EAD_API_KEY": ""}, None),
        ([], {"EAD_API_KEY": "exported"}, "exported"),
        ([], {"EAD_API_KEY_FILE": "KEY"}, "filed"),
        (["--api-key", "given"], {"EAD_API_KEY": "exported"}, "given"),
        (["--api-key=given"], {"EAD_API_KEY": "exported"}, "given"),
        (["--api-key-file", "KEY"], {}, "filed"),
    ],
)
def test_a_server_of_ones_own_is_asked_with_the_key_that_it_asks_for(
    arguments: list[str],
    environ: dict[str, str],
    key: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("EAD_API_KEY", raising=False)
    (tmp_path / "KEY").write_text("\ufefffiled\n")
    arguments = [argument.replace("KEY", str(tmp_path / "KEY")) for argument in arguments]
    for name, value in environ.items():
        monkeypatch.setenv(name, value.replace("KEY", str(tmp_path / "KEY")))
    command = (sys.executable, "-c", "")
    with ServerProcess(arguments, tmp_path / "log", command=command) as process:
        assert process.api_key == key


def test_train_and_eval_send_their_servers_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EAD_API_KEY", "exported")
    monkeypatch.setattr(train, "_COMMAND", (sys.executable, "-c", "import time; time.sleep(60)"))
    monkeypatch.setattr(ServerProcess, "wait_until_ready", lambda self, timeout_s: None)
    config = TrainConfig().server
    with train.server_for(config, "model", tmp_path, lambda line: None) as server:
        assert server.client._http.headers["authorization"] == "Bearer exported"


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("\ufeffsteps = 7\n")
    assert read_config([str(tmp_path / "run.toml")]).steps == 7
    (tmp_path / "key").write_text("\ufeffs3cret\n")
    assert read_key(None, tmp_path / "key") == "s3cret"
    (tmp_path / "bad.toml").write_bytes(b"steps = '\xff'")
    with pytest.raises(BadConfig, match="is not TOML"):
        read_config([str(tmp_path / "bad.toml")])


def test_eval_of_another_server_fetches_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "resolve", lambda path: pytest.fail("it was fetched"))
    arguments = ["server.url=http://127.0.0.1:9", "server.timeout_s=0.01"]
    result = CliRunner().invoke(app, ["eval", *arguments, "--folder", str(tmp_path / "eval")])
    assert result.exit_code == 1
    assert "http://127.0.0.1:9 was not ready" in result.stderr


def test_a_server_asks_itself_past_any_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "mine.example")
    monkeypatch.delenv("no_proxy", raising=False)
    serve._ask_itself_directly("10.0.0.7")
    assert os.environ["NO_PROXY"] == "mine.example,localhost,127.0.0.1,::1,10.0.0.7"
    assert os.environ["no_proxy"] == "localhost,127.0.0.1,::1,10.0.0.7"


# --- what is printed -----------------------------------------------------------------------------

MARKUP = "got '[/INST]' [bold]x[/] :smile: [red]"


def test_what_is_said_during_a_run_is_no_markup() -> None:
    out = io.StringIO()
    Display(Console(file=out, width=40), 1).say(MARKUP)
    assert out.getvalue() == MARKUP + "\n"
    console = train._console()
    with console.capture() as captured:
        console.print(MARKUP, soft_wrap=True)
    assert captured.get() == MARKUP + "\n"


def test_a_log_line_of_the_demo_is_no_markup() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with demo._waiting(console, "starting") as say:
        say("[/INST] loading")
    assert "starting" in out.getvalue()


def test_a_schedule_in_a_heading_is_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(app, ["schedule", '{"schedule":"constant","tau":[/INST]}'])
    assert result.exit_code == 1
    assert "[/INST]" in result.stderr
    schedule.show({"[/INST]": [1.0, 0.5]}, as_table=True, as_json=False, out=None)


def test_a_bad_address_or_folder_is_a_sentence(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["chat", "hi", "--url", "ftp://x"])
    assert "--url: base_url: must be http[s]://HOST" in str(result.exception) + result.output
    result = CliRunner().invoke(app, ["plot", str(tmp_path)])
    assert result.exit_code == 1
    assert "has no metrics.jsonl" in result.stderr


def test_a_chat_shows_the_thinking_and_does_not_repeat_it(capsys: Any) -> None:
    said: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        said.append(json.loads(request.content)["messages"])
        deltas = [{"reasoning_content": "let me\u2028see"}, {"content": "seven"}]
        events = [
            {"id": "a", "model": "m", "choices": [{"index": 0, "delta": delta}]} for delta in deltas
        ]
        text = "".join(f"data: {json.dumps(e, ensure_ascii=False)}\n\n" for e in events)
        return httpx.Response(200, text=text + "data: [DONE]\n\n")

    client = Client("http://x", transport=httpx.MockTransport(answer))
    console = Console(soft_wrap=True)
    text = chat._answer(console, client, [], None, 9, "temperature")
    assert text == "seven"
    assert "let me\u2028seeseven" in capsys.readouterr().out


# --- schedules -----------------------------------------------------------------------------------


def temperatures(*arguments: str) -> dict[str, list[float]]:
    result = CliRunner().invoke(app, ["schedule", *arguments, "--length", "40", "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, list[float]] = json.loads(result.stdout)["temperatures"]
    return found


def test_a_schedules_own_step_is_shown() -> None:
    own = '{"preset":"paper","step":400}'
    (at_400,) = temperatures("paper", "--step", "400").values()
    (at_0,) = temperatures("paper").values()
    assert at_400 != at_0
    assert temperatures(own) == {own: at_400}
    assert temperatures(own, "--step", "0") == {own: at_0}
    assert temperatures(own, "paper") == {own: at_400, "paper": at_0}


def test_a_preview_is_of_the_schedules_own_step() -> None:
    own = parse_annealing({"preset": "paper", "step": 400})
    assert [*preview.temperatures(own, [], 40, 1.0)] == [400]
    assert [*preview.temperatures(own, [0, 7], 40, 1.0)] == [0, 7]
    assert [*preview.temperatures(parse_annealing({}), [], 40, 1.0)] == [0]


GROWS_OUT = {
    "preset": "paper",
    "tau_min": 0.01,
    "mean_matched": {"temperature": 0.1, "tokens": 1000},
}


def test_a_default_schedule_must_be_right_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "_shared", None)
    monkeypatch.setenv("EAD_SHARED_DEFAULTS", "")
    parse_annealing(GROWS_OUT)
    with pytest.raises(AnnealingError, match=r"mean_matched.temperature: at step \d+: must leave"):
        set_default_annealing(GROWS_OUT)
    set_default_annealing({**GROWS_OUT, "step": 0})
    set_default_annealing({"preset": "paper"})
    set_default_annealing(None)


def test_a_kind_of_ones_own_cannot_leave_the_range() -> None:
    class Wave(PositionSchedule):
        schedule: str = "wave_of_a_test"
        tau: Temperature = 0.8

        def parameters(self) -> tuple[float, ...]:
            return (self.tau,)

        def bounds(self) -> tuple[float, float]:
            return (0.75 * self.tau, 1.25 * self.tau)

        @staticmethod
        def evaluate(t: torch.Tensor, numbers: Numbers, entropy: torch.Tensor) -> torch.Tensor:
            return numbers[0] * (1 + 0.25 * torch.sin(t))

    register(Wave)
    try:
        for tau, low, high in ((8.0, 6, 10), (0.02, 0.015, 0.025)):
            assert parse_annealing({"schedule": "wave_of_a_test", "tau": tau}).bounds() == (
                pytest.approx((low, high))
            )
        for tau in (8.01, 10.0, 0.01, 0.013):
            with pytest.raises(AnnealingError, match=r"must leave every temperature in \[0.01, 10"):
                parse_annealing({"schedule": "wave_of_a_test", "tau": tau})
    finally:
        del REGISTRY["wave_of_a_test"]


# --- bench ---------------------------------------------------------------------------------------


def test_a_batch_that_this_machine_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[Any] = []
    monkeypatch.setattr(resource, "setrlimit", lambda *limits: set_to.append(limits[1]))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 4096))
    bench._allow_files(100)
    assert set_to == []
    bench._allow_files(1024)
    assert set_to == [(1152, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 512))
    result = CliRunner().invoke(app, ["bench", "--batch", "1024", "--url", "http://127.0.0.1:9"])
    assert result.exit_code == 1
    assert "--batch: 1024 answers at once need 1152 open files of 512" in result.stderr
