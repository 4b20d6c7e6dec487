"""`ead serve`: SGLang's own launcher with the plugin in place and defaults for this machine."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ead_sampler import device
from ead_sampler.defaults import DEFAULT_ANNEALING, default_annealing
from ead_sampler.in_tokenizer.server_mode import unsupported_mode
from ead_server.calls import log_to_stderr
from ead_server.edge.headers import is_loopback
from ead_server.launch import flags
from ead_server.launch.process import hold_port
from ead_server.lifecycle import shutdown, state, watch
from ead_server.settings import Settings, current

DEFAULT_MODEL = "smollm2"

# Metrics, and one line per request: ours, see edge/guard.py
_FLAGS = (("--enable-metrics",), ("--log-level-http", "warning"))

# Where torch_native and pytorch are the backends that work; a user's own flag wins.
_CPU_FLAGS = (
    ("--device", "cpu"),
    ("--attention-backend", "torch_native"),
    ("--sampling-backend", "pytorch"),
    # SGLang would fill most of the memory with its cache, and spin on a core while idle; a CPU is
    # shared with the trainer.
    ("--mem-fraction-static", "0.25"),
    ("--sleep-on-idle",),
)


def serve(
    arguments: list[str],
    settings: Settings,
    annealing: str | None = None,
    *,
    own_flags: Sequence[str] = (),
) -> None:
    """Run the server until it is stopped.

    arguments: SGLang's, all passed on. annealing: JSON, the schedule of requests without one.
    own_flags: those of `ead serve` itself, to be named where one is mistyped.

    Before any model is loaded, raises SystemExit when this SGLang cannot be extended, and
    ServerFailed when the port is taken.
    """
    shutdown.while_it_loads()
    _say(f"device: {device.choose()}")
    if annealing is not None:
        os.environ[DEFAULT_ANNEALING] = annealing
    settings.export()
    log_to_stderr()
    _put_hooks_in_place()  # before SGLang's flags are read, whose choices its plugins may extend
    arguments = flags.expanded(arguments)
    flags.check(arguments, own_flags)
    arguments = with_defaults(arguments, cpu=device.is_cpu())
    if default_annealing() is not None:
        _say(f"default schedule: {json.dumps(default_annealing())}")

    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    server_args = prepare_server_args(arguments)
    reason = unsupported_mode(server_args, os.environ)
    if default_annealing() is not None and reason is not None:
        raise SystemExit(f"ead: this server cannot honour a default schedule: {reason}")
    _ask_itself_directly(server_args.host)
    refused = flags.refused(server_args, os.environ)
    if refused is not None:
        flags.refuse(refused)
    settings = flags.with_keys_of(settings, server_args)
    settings = settings.model_copy(update={"on_loopback": is_loopback(server_args.host)})
    settings.export()
    if not settings.on_loopback and settings.api_key is None:
        _say(
            f"WARNING: listening on {server_args.host} without an API key: whoever reaches this "
            "port can generate without limit; set EAD_API_KEY or --api-key-file"
        )
    if server_args.tokenizer_worker_num > 1:
        shutdown.when_supervised()
    # before the model is loaded: SGLang finds out after it, then hangs in its warm-up
    hold_port(server_args.host, server_args.port).close()
    reports = _wants_crash_reports(server_args)  # then SGLang ends the server, when it has them
    watch.start((lambda status: None) if reports else shutdown.end_now, with_parent=False)
    try:
        run_server(server_args)
    finally:
        watch.stand_down()
        kill_process_tree(os.getpid(), include_parent=False)


def _put_hooks_in_place() -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()

    from ead_server import plugin

    missing = plugin.hooks_not_in_place()
    if missing:
        raise SystemExit("ead: SGLang did not apply these hooks: " + ", ".join(missing))
    _say(f"sglang {plugin.SUPPORTED_SGLANG}, {len(plugin.HOOKS)} hooks in place")


# SGLang asks its scheduler for these before it ends because a process died: a minute and more of
# silence, by default, with nothing to find on most machines
_CRASH_REPORTS = ("SGLANG_PYSPY_DUMP_BEFORE_CRASH", "SGLANG_CUDA_COREDUMP_BEFORE_CRASH")


def _wants_crash_reports(server_args: Any) -> bool:
    """Whether the user has asked for what takes SGLang its time when a process dies."""
    asked = (os.environ.setdefault(name, "0").lower() in _TRUE for name in _CRASH_REPORTS)
    return any([*asked, server_args.crash_dump_folder])


_TRUE = ("true", "1", "yes", "y")  # as SGLang reads them


def _ask_itself_directly(host: str) -> None:
    """SGLang's first requests, and those among its processes, go to this machine, where a proxy of
    the environment cannot reach."""
    for name in ("NO_PROXY", "no_proxy"):
        known = [part for part in os.environ.get(name, "").split(",") if part.strip()]
        here = [part for part in ("localhost", "127.0.0.1", "::1", host) if part not in known]
        os.environ[name] = ",".join([*known, *here])


def _say(line: str) -> None:
    print(f"ead: {line}", file=sys.stderr, flush=True)


# --- hooks, see ead_server.hooks ----------------------------------------------------------------


def add_api_key_middleware(original: Callable[..., None], *args: Any, **keys: Any) -> None:
    """AROUND sglang.srt.utils.auth.add_api_key_middleware."""
    if current() is None:
        original(*args, **keys)


def warm_up(original: Callable[..., None], *args: Any, **keys: Any) -> None:
    """AROUND http_server._wait_and_warmup, a thread of each process that answers HTTP.

    The requests that SGLang sends itself in it carry a key of ours.
    """
    settings = current()
    if settings is None:
        original(*args, **keys)
        return
    from sglang.srt.runtime_context import get_serving

    key = settings.warm_up_key
    with get_serving().override(api_key=key, admin_api_key=key):
        original(*args, **keys)
    manager = state.manager()
    if manager is None or state.starting():
        return
    if manager.server_args.tokenizer_worker_num == 1:
        _say(_ready_line(manager, settings))


def _ready_line(manager: Any, settings: Settings) -> str:
    """Where the server listens, and what a person may open there."""
    server_args = manager.server_args
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server_args.host, server_args.host)
    host = f"[{host}]" if ":" in host else host
    url = f"{'https' if server_args.ssl_certfile else 'http'}://{host}:{server_args.port}"
    key = "no key is needed" if settings.api_key is None else "calls need the API key"
    return f"ready at {url} ({key}); schedules are drawn at {url}/annealing, routes at {url}/docs"


def with_defaults(arguments: list[str], *, cpu: bool) -> list[str]:
    """SGLang's arguments with our defaults for what they leave out, and the model resolved."""
    from ead_server.launch.models import resolve

    arguments = list(arguments)
    model_at = next((i for i, a in enumerate(arguments) if _flag(a) in _MODEL_FLAGS), None)
    if model_at is None and not any(_flag(a) == "--config" for a in arguments):
        arguments += ["--model-path", DEFAULT_MODEL]
        model_at = len(arguments) - 2
    if model_at is not None:
        name = _value(arguments, model_at)
        if name == DEFAULT_MODEL and not _given(arguments, "--served-model-name"):
            arguments += ["--served-model-name", DEFAULT_MODEL]
        _check_model(name)
        _replace(arguments, model_at, resolve(name))
    for flag, *value in (*_FLAGS, *(_CPU_FLAGS if cpu else ())):
        if not _given(arguments, flag):
            arguments += [flag, *value]
    return arguments


_MODEL_FLAGS = ("--model-path", "--model")


def _check_model(name: str) -> None:
    """Raises SystemExit for a path where no model is. Other names are SGLang's to look up."""
    if name.startswith(("/", "./", "../", "~")) and not Path(name).expanduser().exists():
        raise SystemExit(
            f"ead: --model-path: {name} does not exist; give the folder of a model, its name on "
            f"the hub, or {DEFAULT_MODEL}"
        )


def _flag(argument: str) -> str:
    return argument.split("=", 1)[0]


def _given(arguments: list[str], flag: str) -> bool:
    return any(_flag(argument) == flag for argument in arguments)


def _value(arguments: list[str], at: int) -> str:
    if "=" in arguments[at]:
        return arguments[at].split("=", 1)[1]
    if at + 1 >= len(arguments):
        raise SystemExit(f"ead: {arguments[at]} needs a value")
    return arguments[at + 1]


def _replace(arguments: list[str], at: int, value: str) -> None:
    if "=" in arguments[at]:
        arguments[at] = f"{_flag(arguments[at])}={value}"
    else:
        arguments[at + 1] = value
