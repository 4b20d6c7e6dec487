"""SGLang's own flags, files and environment: what `ead serve` adopts, and refuses at start.

SGLang can be told the same as a flag, as a flag cut short (`--api-k`), in a file (`--config`) and
by a variable. So what matters is read from the arguments as SGLang has parsed them.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ead_server.settings import Settings

_UNGUARDED = "opens another way in, without the keys and limits of `ead serve`"
REFUSED = {  # fields of SGLang's ServerArgs
    "enable_custom_logit_processor": "unpickles code that clients send; use `annealing`",
    "grpc_mode": _UNGUARDED,
    "smg_grpc_mode": _UNGUARDED,
    "grpc_port": _UNGUARDED,
    "encoder_only": "starts another server than the one that is extended here",
    "enable_http2": "runs another HTTP server than the one that is ended in time here",
}
REFUSED_VARIABLES = {
    "SGLANG_ENABLE_REQUEST_DECOMPRESSION": "a small request would become a large one unseen",
    "DUMPER_SERVER_PORT": _UNGUARDED,
    "SGLANG_GRPC_PORT": _UNGUARDED,
}
_HELD = "held by ead serve"


def expanded(arguments: Sequence[str]) -> list[str]:
    """Arguments with the whole names of flags, and those of a `--config` file among them.

    Raises SystemExit for a file that cannot be read.
    """
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

    parser = argparse.ArgumentParser(add_help=False)
    ServerArgs.add_cli_args(parser)
    known = parser._option_string_actions
    whole: list[str] = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        meant = [name for name in known if name.startswith(flag)]
        if flag.startswith("--") and len(flag) > 2 and flag not in known and len(meant) == 1:
            argument = meant[0] + equals + value
        if argument.startswith("--config="):
            whole += ["--config", argument.partition("=")[2]]
        else:
            whole.append(argument)
    try:
        return list(ConfigArgumentMerger(parser).merge_config_with_args(whole))
    except (OSError, ValueError) as error:
        refuse(f"--config: {error}")


class _Parser(argparse.ArgumentParser):
    """SGLang's flags, with mistakes in one line: its own parser prints all its flags before it."""

    def error(self, message: str) -> NoReturn:
        found = re.fullmatch(
            r"argument (--[^/]+).*: expected (?:one|at least one) argument", message
        )
        if found is not None:
            refuse(f"{found[1]} needs a value")
        print(f"ead: {message}", file=sys.stderr)
        raise SystemExit(2)  # as argparse, for a command that cannot be run again as it is


def check(arguments: Sequence[str], own_flags: Sequence[str]) -> None:
    """Raises SystemExit for an unknown flag, with the nearest that is known, and for a value that a
    flag does not take.

    own_flags: those of `ead serve` itself, which are taken out of the arguments already.
    """
    from sglang.srt.server_args import ServerArgs

    parser = _Parser(prog="ead serve", add_help=False)
    ServerArgs.add_cli_args(parser)
    for action in parser._actions:
        action.required = False  # what is left out has a default of ours
    values, unknown = parser.parse_known_args(list(arguments))
    if not 0 <= values.port <= 65535:
        parser.error(f"--port: must be an integer from 0 to 65535, got {values.port}")
    if not unknown:
        return
    name = unknown[0].partition("=")[0]
    if not name.startswith("-"):
        parser.error(f"ead serve has no argument {name!r}: everything is a flag and its value")
    known = [*parser._option_string_actions, *own_flags]
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else "see `ead serve --help`"
    parser.error(f"{name} is not a flag of ead serve or SGLang; {hint}")


def refuse(message: str) -> NoReturn:
    """End before any model is loaded, with one sentence."""
    raise SystemExit(f"ead: {message}")


def refused(server_args: Any, environ: Mapping[str, str]) -> str | None:
    """Why a setting of SGLang's is not taken, naming it, or None."""
    for name, reason in REFUSED.items():
        if getattr(server_args, name, None):
            return f"--{name.replace('_', '-')}: {reason}"
    for name, reason in REFUSED_VARIABLES.items():
        if environ.get(name, "").lower() not in ("", "0", "false", "no", "off", "-1"):
            return f"{name}: {reason}"
    return None


def with_keys_of(settings: Settings, server_args: Any) -> Settings:
    """The settings with the keys that SGLang was given its own way; SGLang itself forgets them.

    They are the guard's to check, and stay out of what SGLang prints and shows. To SGLang it only
    matters that there is one for admins: some of its routes are closed otherwise. Raises SystemExit
    where two keys are given for the same thing.
    """
    found = {}
    for name in ("api_key", "admin_api_key"):
        theirs, ours = getattr(server_args, name), getattr(settings, name)
        if theirs and ours and theirs != ours:
            flag = name.replace("_", "-")
            refuse(f"--{flag} is given twice, with different keys (in SGLang's --config?)")
        if theirs:
            found[name] = theirs
            _forget(server_args, theirs)
    server_args.api_key, server_args.admin_api_key = None, _HELD
    return settings.model_copy(update=found)


def _forget(server_args: Any, secret: str) -> None:
    command = getattr(server_args, "_launch_command", None)  # shown on /server_info
    if isinstance(command, str):
        server_args._launch_command = command.replace(secret, "***")
    elif isinstance(command, (list, tuple)):
        server_args._launch_command = [str(word).replace(secret, "***") for word in command]
