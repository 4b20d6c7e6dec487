"""`ead train` and `ead eval`, with the server that the settings name or one of their own."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from ead_cli.options import never_connected
from ead_client import Client, ConnectionFailed, EadError, RequestRefused, ServerUnavailable
from ead_sampler import device
from ead_sampler.defaults import DEFAULT_ANNEALING
from ead_server.launch import models
from ead_server.launch.process import ServerProcess, flags_beside_a_trainer
from ead_server.settings import read_key
from trainer_bridge.errors import BadConfig
from trainer_bridge.run.config import ServerConfig, TrainConfig, read_config
from trainer_bridge.run.evaluate import evaluate
from trainer_bridge.run.loop import train
from trainer_bridge.run.report import Display
from trainer_bridge.run.start_checks import build_task, check_evaluation, check_run
from trainer_bridge.tasks.reward_runner import RewardRunner

# `--restart`: a server that dies comes back on the same port, with the same keys
_COMMAND = (sys.executable, "-m", "ead_cli.main", "serve", "--restart")


class RemoteServer:
    """A server that somebody keeps alive (trainer_bridge.run.loop.Server)."""

    def __init__(self, client: Client, timeout_s: float) -> None:
        self.client = client
        self.timeout_s = timeout_s

    def wait_until_ready(self) -> None:
        """Return when it takes requests, or would if it had whole weights. Raises
        ConnectionFailed when that is not so in time."""
        self._wait(lambda error, left_s: None)

    def find(self, say: Callable[[str], None], countdown: Callable[[str], None]) -> None:
        """`wait_until_ready` at the beginning: a server that is starting is waited for, while an
        address where nothing answers, or something else does, is refused at once.

        say: called with one line, if there is a wait. countdown: called again and again meanwhile.
        """
        waits = False

        def told(error: EadError, left_s: float) -> None:
            nonlocal waits
            url = self.client.base_url
            if never_connected(error) and not waits:
                raise ConnectionFailed(
                    f"server.url: {url} was not ready: no server answers there ({error}); start it "
                    "first, or correct the address"
                ) from error
            if isinstance(error, RequestRefused) and not waits:
                raise ConnectionFailed(
                    f"server.url: {url} was not ready: what answers there is no server of ead "
                    f"(GET /health/ready: {error})"
                ) from error
            if not waits:
                say(f"waiting up to {left_s:.0f} s for the server at {url}, which says: {error}")
            waits = True
            countdown(f"waiting for the server, {left_s:.0f} s left")

        self._wait(told)

    def _wait(self, told: Callable[[EadError, float], None]) -> None:
        """told: called after each try, with what is wrong and the seconds that are left."""
        deadline = time.monotonic() + self.timeout_s
        with Client(self.client.base_url, timeout=5.0, retries=0) as client:
            while True:
                try:
                    client.request("GET", "/health/ready")
                    return
                except EadError as error:
                    # else it is not there yet, or not a server of ours yet
                    if isinstance(error, ServerUnavailable) and "weights" in error.message:
                        return
                    if time.monotonic() > deadline:
                        raise ConnectionFailed(
                            f"{client.base_url} was not ready in {self.timeout_s:.0f} s: {error}"
                        ) from error
                    told(error, deadline - time.monotonic())
                time.sleep(0.5)


@contextmanager
def server_for(
    config: ServerConfig,
    model: str,
    folder: Path,
    say: Callable[[str], None],
    countdown: Callable[[str], None] = lambda text: None,
) -> Iterator[RemoteServer]:
    """The server at `config.url`, or one that serves `model` and is stopped at the end.

    say: called with a line about what is waited for. countdown: see RemoteServer.find. Raises
    ServerFailed when a server of our own does not start, ConnectionFailed when there is none at
    `config.url`.
    """
    if config.url is not None:
        with Client(
            config.url,
            api_key=_key("EAD_API_KEY"),
            admin_api_key=_key("EAD_ADMIN_API_KEY"),
            timeout=_timeout(config),
        ) as client:
            server = RemoteServer(client, config.timeout_s)
            server.find(say, countdown)
            yield server
        return
    device.choose()
    log = folder / "server.log"
    flags = flags_beside_a_trainer(on_cpu=device.is_cpu())
    arguments = [
        "--model-path",
        str(models.resolve(model)),
        "--weights-root",
        str(folder),
        *flags,
        *config.arguments,
    ]
    # a run says itself what it samples with
    environ = {DEFAULT_ANNEALING: ""}
    with ServerProcess(arguments, log, command=_COMMAND, environ=environ) as process:
        say(f"starting a server, log in {log}")
        process.wait_until_ready(config.timeout_s)
        with Client(
            process.url,
            api_key=process.api_key,
            admin_api_key=process.admin_api_key,
            timeout=_timeout(config),
        ) as client:
            yield RemoteServer(client, config.timeout_s)


def _timeout(config: ServerConfig) -> httpx.Timeout:
    return httpx.Timeout(config.silence_s, connect=5.0)


def _key(variable: str) -> str | None:
    file = os.environ.get(f"{variable}_FILE")
    try:
        return read_key(os.environ.get(variable), file)
    except OSError as error:
        raise BadConfig(f"{variable}_FILE: cannot read {file}: {error.strerror}") from None


def run(arguments: list[str], folder: Path, *, resume: bool) -> None:
    """`ead train`: see there. What goes wrong is raised, with what was reached kept in `folder`."""
    device.choose()  # before anything imports transformers, see ead_sampler/device.py
    from transformers.utils import logging

    config, leads = read_config(arguments), int(os.environ.get("RANK", "0")) == 0
    if leads and not resume:  # before a model is pulled and a server is started
        check_run(config, build_task(config.task))
    folder.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()  # ours is enough
    with Display(_console(), config.steps) as display:
        if not leads:
            train(
                _with_model(config),
                folder,
                None,
                display,
                resume=resume,
                finish_step_on_interrupt=True,
            )
            return
        with server_for(
            config.server, config.model.path, folder, display.say, display.phase
        ) as server:
            train(
                _with_model(config),  # which may be fetched now
                folder,
                server,
                display,
                resume=resume,
                finish_step_on_interrupt=True,
            )


def run_evaluation(arguments: list[str], folder: Path, *, as_json: bool) -> None:
    """`ead eval`: see there. Everything but the result goes to stderr."""
    config = read_config(arguments)
    task = build_task(config.task)
    check_evaluation(config.evaluation, task)
    folder.mkdir(parents=True, exist_ok=True)
    console = _console(stderr=True)
    with (
        Progress(console=console, disable=not console.is_terminal, transient=True) as bar,
        contextlib.ExitStack() as at_the_end,
    ):
        shown = bar.add_task("server", total=None)

        def countdown(text: str) -> None:
            bar.update(shown, description=escape(text))

        server = at_the_end.enter_context(
            server_for(config.server, config.model.path, folder, console.print, countdown)
        )
        rewards = at_the_end.enter_context(RewardRunner(task.reward, config.reward))
        bar.update(shown, description=escape(f"problems of {task.name}"))
        result = evaluate(
            server.client,
            task,
            rewards,
            config.evaluation,
            lambda done, total: bar.update(shown, completed=done, total=total),
        )
    if as_json:
        print(result.model_dump_json(indent=1))
        return
    table = Table("", "value", "interval", title=f"{result.task}, {result.problems} problems")
    for name, found in result.estimates.items():
        table.add_row(name, f"{found.value:.3f}", f"{found.low:.3f} to {found.high:.3f}")
    out = _console()
    out.print(table)
    out.print(
        f"decoding {json.dumps(result.decoding)}; weights {', '.join(result.weight_versions)}; "
        f"{result.scored} answers of {result.mean_tokens:.0f} tokens, failed: {result.failures}\n"
        f"{result.interval}",
        soft_wrap=True,
        highlight=False,
    )


def _console(*, stderr: bool = False) -> Console:
    """Prints what it is given: names, errors and settings are no markup."""
    return Console(stderr=stderr, markup=False, emoji=False)


def _with_model(config: TrainConfig) -> TrainConfig:
    """The settings with the model's name resolved to a folder, where it is an embedded one."""
    model = config.model.model_copy(update={"path": str(models.resolve(config.model.path))})
    return config.model_copy(update={"model": model})
