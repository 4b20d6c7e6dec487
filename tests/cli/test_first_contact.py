"""The first call to a server: what a mistyped address says, and one that is starting."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

import ead_cli.train
import ead_client
from ead_cli.main import app
from ead_cli.train import RemoteServer
from ead_client import Client, ConnectionFailed

REFUSED, UNKNOWN = "http://127.0.0.1:9", "http://no-such-host.invalid:30000"


@pytest.mark.parametrize("url", [REFUSED, UNKNOWN])
@pytest.mark.parametrize("command", ["train", "eval", "rollout", "chat", "bench"])
def test_an_address_where_nothing_answers_is_said_at_once(
    command: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # nothing is waited for
    monkeypatch.setattr("ead_cli.train.time.sleep", lambda s: pytest.fail("it waits"))
    monkeypatch.setattr("ead_cli.train.models.resolve", lambda path: pytest.fail("it fetches"))
    (tmp_path / "prompts.txt").write_text("one\n")
    arguments = {
        "train": ["train", "steps=1", f"server.url={url}"],
        "eval": ["eval", "evaluation.problems=2", f"server.url={url}"],
        "rollout": ["rollout", "prompts.txt", "--url", url],
        "chat": ["chat", "hello", "--url", url],
        "bench": ["bench", "--url", url],
    }[command]
    # tries of one call come in quick succession: not a second of silence
    monkeypatch.setattr("ead_client._clock.Clock.sleep", lambda self, seconds: None)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.output
    assert url in result.stderr
    if command in ("train", "eval"):
        assert "no server answers there" in result.stderr
        assert "start it first, or correct the address" in result.stderr


def found(
    answers: list[int | Exception], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], list[str]]:
    """What is said, and the countdown, while a server answers with these statuses in turn."""

    def answer(request: httpx.Request) -> httpx.Response:
        status = answers.pop(0)
        if isinstance(status, Exception):
            raise status
        return httpx.Response(status, json={"error": {"message": "the server is starting"}})

    def client(*args: object, **options: object) -> Client:
        return made(*args, transport=httpx.MockTransport(answer), **options)  # type: ignore[arg-type]

    made = ead_client.Client
    monkeypatch.setattr(ead_cli.train, "Client", client)
    monkeypatch.setattr("ead_cli.train.time.sleep", lambda seconds: None)
    said: list[str] = []
    counted: list[str] = []
    RemoteServer(Client(REFUSED), 600.0).find(said.append, counted.append)
    return said, counted


def test_a_server_that_is_starting_is_waited_for_with_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    restarted = httpx.ConnectError("refused")  # by a server that has answered before
    said, counted = found([503, 503, restarted, 503, 200], monkeypatch)
    assert said == [
        f"waiting up to 600 s for the server at {REFUSED}, which says: "
        "HTTP 503: the server is starting"
    ]
    assert len(counted) == 4
    assert all(re.fullmatch(r"waiting for the server, \d+ s left", line) for line in counted)


def test_what_is_no_server_of_ours_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConnectionFailed, match=f"{REFUSED} .*is no server of ead"):
        found([404], monkeypatch)
