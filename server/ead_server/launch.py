"""`ead serve`: SGLang's own launcher with the plugin in place and defaults for this machine."""

from __future__ import annotations

import json
import os
import sys

from ead_sampler import device
from ead_sampler.defaults import DEFAULT_ANNEALING, default_annealing
from ead_sampler.requests import unsupported_mode
from ead_server.process import hold_port

DEFAULT_MODEL = "smollm2"

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


def serve(arguments: list[str]) -> None:
    """Run the server until it is stopped.

    arguments: SGLang's, all passed on, and `--annealing JSON`, the schedule of requests without.

    Before any model is loaded, raises SystemExit when this SGLang cannot be extended, and
    ServerFailed when the port is taken.
    """
    print(f"ead: device: {device.choose()}", file=sys.stderr, flush=True)
    arguments, annealing = without_annealing(arguments)
    if annealing is not None:
        os.environ[DEFAULT_ANNEALING] = annealing
    arguments = with_defaults(arguments, cpu=device.is_cpu())

    from sglang.srt.plugins import load_plugins

    load_plugins()

    from ead_sampler import plugin

    missing = plugin.hooks_not_in_place()
    if missing:
        raise SystemExit("ead: SGLang did not apply these hooks: " + ", ".join(missing))
    print(
        f"ead: sglang {plugin.SUPPORTED_SGLANG}, {len(plugin.HOOKS)} hooks in place",
        file=sys.stderr,
        flush=True,
    )
    if default_annealing() is not None:
        print(f"ead: default schedule: {json.dumps(default_annealing())}", file=sys.stderr)

    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    server_args = prepare_server_args(arguments)
    reason = unsupported_mode(server_args, os.environ)
    if default_annealing() is not None and reason is not None:
        raise SystemExit(f"ead: this server cannot honour a default schedule: {reason}")
    # before the model is loaded: SGLang finds out after it, then hangs in its warm-up
    hold_port(server_args.host, server_args.port).close()
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def without_annealing(arguments: list[str]) -> tuple[list[str], str | None]:
    """SGLang's arguments, and the value of ours, `--annealing`, if it is among them."""
    at = next((i for i, a in enumerate(arguments) if _flag(a) == "--annealing"), None)
    if at is None:
        return arguments, None
    value = _value(arguments, at)
    width = 1 if "=" in arguments[at] else 2
    return [*arguments[:at], *arguments[at + width :]], value


def with_defaults(arguments: list[str], *, cpu: bool) -> list[str]:
    """SGLang's arguments with our defaults for what they leave out, and the model resolved."""
    from ead_server.models import resolve

    arguments = list(arguments)
    model_at = next((i for i, a in enumerate(arguments) if _flag(a) in _MODEL_FLAGS), None)
    if model_at is None and not any(_flag(a) == "--config" for a in arguments):
        arguments += ["--model-path", DEFAULT_MODEL]
        model_at = len(arguments) - 2
    if model_at is not None:
        name = _value(arguments, model_at)
        if name == DEFAULT_MODEL and not _given(arguments, "--served-model-name"):
            arguments += ["--served-model-name", DEFAULT_MODEL]
        _replace(arguments, model_at, resolve(name))
    if cpu:
        for flag, *value in _CPU_FLAGS:
            if not _given(arguments, flag):
                arguments += [flag, *value]
    return arguments


_MODEL_FLAGS = ("--model-path", "--model")


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
