"""`ead train` and `ead eval`: what they share, above all a server, theirs or one of their own."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from rich.console import Console

from ead_client import Client, ConnectionFailed
from ead_server import models
from ead_server.process import ServerProcess
from trainer_bridge.config import ServerConfig, read_config
from trainer_bridge.loop import train
from trainer_bridge.report import Display

# `--restart`: a server that dies comes back on the same port, with the same keys
_COMMAND = (sys.executable, "-m", "ead_server.cli", "serve", "--restart")


class WaitedFor:
    """A server that somebody keeps alive (trainer_bridge.loop.Server)."""

    def __init__(self, client: Client, patience_s: float) -> None:
        self.client = client
        self.patience_s = patience_s

    def wait_until_ready(self) -> None:
        """Return when it takes requests, or would if it had whole weights. Raises
        ConnectionFailed when that is not so in time."""
        deadline = time.monotonic() + self.patience_s
        while True:
            try:
                answer = httpx.get(f"{self.client.base_url}/health/ready", timeout=5)
                if answer.status_code == 200 or "weights" in answer.json().get("status", ""):
                    return
            except (httpx.HTTPError, ValueError):
                pass  # not there yet, or not a server of ours yet
            if time.monotonic() > deadline:
                raise ConnectionFailed(
                    f"{self.client.base_url} was not ready in {self.patience_s:.0f} s"
                )
            time.sleep(0.5)


@contextmanager
def server_for(
    config: ServerConfig, model: str, folder: Path, say: Callable[[str], None]
) -> Iterator[WaitedFor]:
    """The server at `config.url`, or one that serves `model` and is stopped at the end.

    say: told what is waited for. Raises ServerFailed when a server of our own does not start.
    """
    if config.url is not None:
        keys = {
            "api_key": os.environ.get("EAD_API_KEY"),
            "admin_api_key": os.environ.get("EAD_ADMIN_API_KEY"),
        }
        with Client(config.url, **keys) as client:
            server = WaitedFor(client, config.patience_s)
            server.wait_until_ready()
            yield server
        return
    # float32, since a trainer's steps are smaller than bfloat16 resolves
    arguments = ["--model-path", model, "--dtype", "float32", "--weights-root", str(folder)]
    log = folder / "server.log"
    with ServerProcess([*arguments, *config.arguments], log, command=_COMMAND) as process:
        say(f"starting a server, log in {log}")
        process.wait_until_ready(config.patience_s)
        with Client(process.url, admin_api_key=process.admin_api_key) as client:
            yield WaitedFor(client, config.patience_s)


def run(arguments: list[str], folder: Path, *, resume: bool) -> None:
    """`ead train`: see there. What goes wrong is raised, with what was reached kept in `folder`."""
    config = read_config(arguments)
    model = str(models.resolve(config.model.path))
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": model})})
    folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    with Display(console, config.steps) as display:
        if int(os.environ.get("RANK", "0")) != 0:
            train(config, folder, None, display, resume=resume)
            return
        with server_for(config.server, model, folder, display.say) as server:
            train(config, folder, server, display, resume=resume)
