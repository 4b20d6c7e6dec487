"""The client as a package: its two forms, its errors, what its public names say. No server."""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
import pickle
import runpy
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

import ead_client
from ead_client import (
    AsyncClient,
    Client,
    EadError,
    NotSendable,
    RequestRefused,
    ScheduleIgnored,
    TimedOut,
    errors,
)

ROOT = Path(ead_client.__file__).parent.parent.parent
MESSAGES = [{"role": "user", "content": "hi"}]


# --- the sync form ------------------------------------------------------------------------------


@pytest.fixture
def unasync() -> Callable[..., int]:
    main: Callable[..., int] = runpy.run_path(str(ROOT / "scripts/unasync.py"))["main"]
    return main


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the client's two forms."""
    for name in ("_async", "_sync"):
        shutil.copytree(
            ROOT / "client/ead_client" / name,
            tmp_path / name,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    return tmp_path


@pytest.mark.parametrize("change", ["edited", "missing", "left over", "of a new source"])
def test_a_sync_form_that_is_not_what_its_source_makes_is_found_and_mended(
    change: str, package: Path, unasync: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert unasync(check=True, client=package) == 0
    client, other = package / "_sync/client.py", package / "_sync/other.py"
    made = client.read_text()
    if change == "edited":
        client.write_text(made.replace("retries: int = 3", "retries: int = 4"))
    elif change == "missing":
        client.unlink()
    elif change == "left over":
        other.write_text("left = 1\n")
    else:
        (package / "_async/other.py").write_text("async def f() -> None:\n    await g()\n")
    capsys.readouterr()
    assert unasync(check=True, client=package) == 1
    name = "client.py" if change in ("edited", "missing") else "other.py"
    assert f"_sync/{name}: is not what _async makes" in capsys.readouterr().out
    assert unasync(check=False, client=package) == 0
    assert unasync(check=True, client=package) == 0
    assert client.read_text() == made
    assert other.exists() == (change == "of a new source")


def test_a_line_that_no_rule_makes_synchronous_is_refused(
    package: Path, unasync: Callable[..., int]
) -> None:
    (package / "_async/odd.py").write_text("import asyncio\n")
    with pytest.raises(SystemExit, match=r"odd\.py: no rule makes this synchronous: import async"):
        unasync(check=True, client=package)


def public(kind: type) -> dict[str, Any]:
    return {name: value for name, value in vars(kind).items() if not name.startswith("_")}


def test_both_clients_have_the_same_calls_with_the_same_parameters() -> None:
    assert [name.removeprefix("a") for name in public(AsyncClient)] == [*public(Client)]
    for name, call in public(AsyncClient).items():
        other = public(Client)[name.removeprefix("a")]
        assert [*inspect.signature(call).parameters] == [*inspect.signature(other).parameters]


def test_every_public_name_says_what_it_is() -> None:
    for name in ead_client.__all__:
        kind = getattr(ead_client, name)
        assert "__doc__" in vars(kind), name
        assert kind.__doc__, name
        for method, value in public(kind).items():
            if callable(value) or isinstance(value, property):
                assert value.__doc__, f"{name}.{method}"
    for kind in (AsyncClient, Client):
        words = " ".join([kind.__doc__ or "", *(str(v.__doc__) for v in public(kind).values())])
        assert ("async" in words.lower().replace("asynchronous", "async")) == (kind is AsyncClient)


# --- errors -------------------------------------------------------------------------------------


def test_the_tree_of_errors_is_drawn_as_it_is() -> None:
    def below(kind: type[EadError], depth: int) -> list[tuple[int, str]]:
        children = [line for child in kind.__subclasses__() for line in below(child, depth + 1)]
        return [(depth, kind.__name__), *children]

    drawn = []
    for line in (errors.__doc__ or "").splitlines():
        branch, _, name = line.removeprefix(" " * 4).rpartition("── ")
        if branch or name == "EadError":
            drawn.append(((len(branch) + 3) // 4, name.split()[0]))
    assert drawn == below(EadError, 0)
    assert {name for _, name in drawn} <= {*ead_client.__all__}


def client_of(answer: httpx.Response) -> Client:
    return Client("http://x", transport=httpx.MockTransport(lambda _: answer))


def refused_request() -> None:
    error = {"message": "must be below 2", "type": "invalid_request_error", "param": "annealing"}
    client_of(httpx.Response(400, json={"error": error})).chat(MESSAGES, annealing={})


def ignored_schedule() -> None:
    choice = {"index": 0, "message": {"content": "ok"}, "finish_reason": "stop"}
    body = {"id": "a", "model": "m", "choices": [choice]}
    client_of(httpx.Response(200, json=body)).chat(MESSAGES, annealing={})


def unsendable_request() -> None:
    client_of(httpx.Response(200)).chat(MESSAGES, top_p=float("nan"))


@pytest.mark.parametrize(
    ("call", "kind", "attributes", "text"),
    [
        (
            refused_request,
            RequestRefused,
            {"status": 400, "param": "annealing", "reason": "must be below 2"},
            "HTTP 400: must be below 2",
        ),
        (
            ignored_schedule,
            ScheduleIgnored,
            {
                "param": "annealing",
                "reason": "asked for annealing, and the answer does not say it was applied",
            },
            "asked for annealing, and the answer does not say it was applied",
        ),
        (
            unsendable_request,
            NotSendable,
            {"param": "top_p", "reason": "must be a finite number, got nan"},
            "top_p: must be a finite number, got nan",
        ),
    ],
)
def test_status_field_and_reason_are_attributes_and_survive_pickling(
    call: Callable[[], None], kind: type[EadError], attributes: dict[str, Any], text: str
) -> None:
    with pytest.raises(kind) as caught:
        call()
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value)), copy.copy(caught.value)):
        assert type(error) is kind
        assert {name: getattr(error, name) for name in attributes} == attributes
        assert str(error) == text


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_after_its_deadline_a_call_is_not_begun(
    kind: str, recwarn: pytest.WarningsRecorder
) -> None:
    """Nor is a coroutine made that nothing awaits, of which Python would warn."""
    transport = httpx.MockTransport(lambda _: pytest.fail("it was sent"))
    fields: Any = {"transport": transport, "deadline": 0}

    def call() -> None:
        if kind == "sync":
            Client("http://x", **fields).chat(MESSAGES)
        else:
            asyncio.run(AsyncClient("http://x", **fields).chat(MESSAGES))

    with pytest.raises(TimedOut, match="deadline of 0 s"):
        call()
    assert not [str(warning.message) for warning in recwarn]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_deadline_that_passes_while_a_piece_is_used_ends_the_stream(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    choice = {"index": 0, "delta": {"content": "x"}}
    event = json.dumps({"id": "a", "model": "m", "choices": [choice]}).encode()
    parts = [b"data: " + event + b"\n", b"\n"] * 3  # the first part ends with the first piece

    async def arriving() -> Any:
        for part in parts:
            yield part

    content: Any = iter(parts) if kind == "sync" else arriving()
    transport = httpx.MockTransport(lambda _: httpx.Response(200, content=content))
    fields: Any = {"transport": transport, "deadline": 10.0}

    def sync() -> None:
        nonlocal now
        for _ in Client("http://x", **fields).stream_chat(MESSAGES):
            now += 11.0

    async def awaited() -> None:
        nonlocal now
        async for _ in AsyncClient("http://x", **fields).stream_chat(MESSAGES):
            now += 11.0

    with pytest.raises(TimedOut, match="deadline of 10 s"):
        sync() if kind == "sync" else asyncio.run(awaited())
    assert now == 11.0
