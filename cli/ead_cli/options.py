"""What several commands of `ead` take, and how they say what went wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ead_client import Client

Url = Annotated[str, typer.Option(envvar="EAD_URL", help="Server URL.")]
ApiKey = Annotated[
    str | None, typer.Option(envvar="EAD_API_KEY", help="API key, if the server needs one.")
]
LOCAL = "http://127.0.0.1:30000"
Scheduled = Annotated[
    str | None,
    typer.Option(
        "--annealing", help="Schedule: JSON, a preset, or a kind. Without it, temperature 1."
    ),
]


def read_key(value: str | None, file: Path | None) -> str | None:
    from ead_server import settings

    try:
        return settings.read_key(value, file)
    except OSError as error:
        raise SystemExit(f"ead: cannot read {file}: {error.strerror}") from None


def client_of(url: str | list[str], api_key: str | None) -> Client:
    from ead_client import Client

    try:
        return Client(url, api_key=api_key)
    except ValueError as error:
        raise SystemExit(f"ead: --url: {error}") from None


def never_connected(error: BaseException) -> bool:
    """Whether nothing answers at the address at all: what a mistyped one looks like."""
    import httpx

    unconnected = (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError)
    return isinstance(error.__cause__, unconnected)


def schedule_of(text: str | None) -> dict[str, Any] | None:
    from ead_cli.schedule import parsed

    return None if text is None else parsed(text)


def sampling_params(text: str, options: dict[str, int | None]) -> dict[str, Any]:
    """The sampling parameters as they are typed, with the options that are some of them."""
    import json

    try:
        params = json.loads(text)
    except ValueError as error:
        raise SystemExit(f"ead: --sampling: is not valid JSON ({error})") from None
    if not isinstance(params, dict):
        raise SystemExit(f"ead: --sampling: must be an object, got {text}")
    for name in ("prompts", "annealing", "entropies", "texts", "idempotency_key"):
        if name in params:
            raise SystemExit(f"ead: --sampling: {name} is no sampling parameter")
    for name, value in options.items():
        given = params.get(name, value)
        if name in params and (type(given) is not int or given < 1):
            raise SystemExit(f"ead: --sampling: {name} must be an integer from 1 on, got {given!r}")
        if value is not None and given != value:
            flag = f"-{name}" if len(name) == 1 else f"--{name.replace('_', '-')}"
            raise SystemExit(f"ead: --sampling: {name} is {given}, and {flag} is {value}")
        if given is not None:
            params[name] = given
    return params


INTERRUPTED = 130  # the exit status after Ctrl-C: 128 + SIGINT, as shells have it


@contextmanager
def errors_as_messages(*, go_on: str = "") -> Iterator[None]:
    """What a user can act on is a sentence on stderr and exit status 1, not a stack trace. After
    Ctrl-C the sentence says how to go on, and the exit status is 130.

    go_on: that part of the sentence; empty where there is nothing to go on with.
    """
    from ead_client import EadError
    from ead_server.errors import ServerFailed
    from ead_server.launch.models import ModelPullError
    from trainer_bridge.errors import BridgeError, Interrupted

    try:
        yield
    except (KeyboardInterrupt, Interrupted) as error:
        how = str(error) or "stopped by Ctrl-C"
        if os.environ.get("RANK", "0") == "0":  # one of torchrun's processes says it
            print(f"ead: {how}{go_on and '; ' + go_on}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    except (ModelPullError, ServerFailed, EadError, BridgeError, OSError) as error:
        print(f"ead: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
