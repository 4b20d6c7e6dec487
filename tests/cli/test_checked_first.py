"""What is wrong with paths, flags and ports is said in one line, before any work. No server."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ead_cli.main import app
from ead_cli.outputs import cannot_write
from ead_server.errors import ServerFailed
from ead_server.launch import flags
from ead_server.launch.process import hold_port
from ead_server.launch.serve import with_defaults

OUTPUTS = [
    ("train", "--folder", ["steps=1"]),
    ("eval", "--folder", []),
    ("demo", "--out", []),
    ("schedule", "--out", ["paper"]),
    ("rollout", "--out", ["prompts.txt", "--url", "http://127.0.0.1:9"]),
]


def refused(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What a command says that must not begin its work."""
    for work in (
        "ead_cli.train.run",
        "ead_cli.train.run_evaluation",
        "ead_cli.demo.models.pull",
        "ead_cli.schedule.curves",
        "ead_cli.rollout._served",
    ):
        monkeypatch.setattr(work, lambda *_, **__: pytest.fail("it has begun"))
    result = CliRunner().invoke(app, [*arguments])
    assert result.exit_code == 1, result.output
    lines = (result.stderr or str(result.exception)).strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(("command", "flag", "more"), OUTPUTS)
def test_an_output_below_a_file_is_refused_before_any_work(
    command: str, flag: str, more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "prompts.txt").write_text("one\n")
    said = refused(monkeypatch, command, *more, flag, "file/below/x.png")
    assert re.match(rf"ead: {flag}: cannot write .*file/below.*: .*/file is not a folder", said), (
        said
    )


@pytest.mark.parametrize(("command", "flag", "more"), OUTPUTS)
def test_an_output_without_permission_is_refused_before_any_work(
    command: str, flag: str, more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("one\n")
    (tmp_path / "closed").mkdir()
    may = os.access  # root may write anywhere
    closed = str(tmp_path / "closed")
    monkeypatch.setattr(os, "access", lambda path, mode: path != closed and may(path, mode))
    said = refused(monkeypatch, command, *more, flag, "closed/x/y.png")
    assert re.match(rf"ead: {flag}: cannot write .*closed/x", said), said
    assert f"no permission to write to {closed}" in said


def test_what_can_be_made_is_no_mistake(tmp_path: Path) -> None:
    assert cannot_write(tmp_path / "a" / "b" / "c.jsonl") is None
    assert cannot_write(tmp_path) is None
    assert cannot_write(Path("relative") / "to" / "here") is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--modle-path", "x"], "--modle-path is not a flag of .*; did you mean --model-path?"),
        (["--max-body-byte=5"], "--max-body-byte is not a flag of .*mean --max-body-bytes?"),
        (["--zzz"], "--zzz is not a flag of ead serve or SGLang; see `ead serve --help`"),
        (["model"], "has no argument 'model'"),
        (["--port", "many"], "argument --port: invalid int value: 'many'"),
        (["--port", "99999"], "--port: must be an integer from 0 to 65535, got 99999"),
        (["--dtype", "flot"], "argument --dtype: invalid choice: 'flot'"),
        (["--port"], "--port needs a value"),
    ],
)
def test_a_wrong_flag_of_serve_is_one_line(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        flags.check(arguments, ["--max-body-bytes", "--annealing"])
    lines = (capsys.readouterr().err.strip() or str(caught.value)).splitlines()
    assert len(lines) == 1, lines
    assert re.search(says.replace("?", "\\?"), lines[0]), lines[0]


def test_flags_of_sglang_are_taken_as_it_takes_them() -> None:
    flags.check(["--tp-siz", "1", "--port=30000", "--served-model-name", "a b"], [])
    flags.check(["--json-model-override-args", '{"a": -1}'], [])


def test_a_taken_port_comes_with_one_that_is_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServerFailed, match="Address already in use; --port") as caught:
            hold_port("127.0.0.1", port)
    (free,) = re.findall(r"--port (\d+) is free", str(caught.value))
    assert int(free) > port
    hold_port("127.0.0.1", int(free)).close()
    with pytest.raises(ServerFailed, match="--port: must be an integer from 0 to 65535"):
        hold_port("127.0.0.1", 65536)


@pytest.mark.parametrize("form", [["--model-path", "{}"], ["--model={}"]])
def test_a_model_s_folder_that_is_not_there_is_refused_by_name(
    form: list[str], tmp_path: Path
) -> None:
    missing = str(tmp_path / "mdel")
    with pytest.raises(SystemExit, match=f"--model-path: {re.escape(missing)} does not exist"):
        with_defaults([part.format(missing) for part in form], cpu=True)
    assert str(tmp_path) in with_defaults(["--model-path", str(tmp_path)], cpu=True)
    assert "org/model" in with_defaults(["--model-path", "org/model"], cpu=True)
