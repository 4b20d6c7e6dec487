"""`ead serve`: our own flags, read before SGLang reads its."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ead_cli.options import errors_as_messages, read_key, schedule_of


# long, since each flag of the command is a parameter of its function
def serve(
    context: typer.Context,
    annealing: Annotated[
        str | None,
        typer.Option(
            envvar="EAD_ANNEALING",
            help="Default schedule: JSON, a preset, or a kind.",
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="EAD_API_KEY", help="Key that every call except health needs."),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(envvar="EAD_API_KEY_FILE", help="File that contains the key.")
    ] = None,
    admin_api_key: Annotated[
        str | None,
        typer.Option(envvar="EAD_ADMIN_API_KEY", help="Key for calls that change the server."),
    ] = None,
    admin_api_key_file: Annotated[
        Path | None, typer.Option(envvar="EAD_ADMIN_API_KEY_FILE", help="File that contains it.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Site whose pages may call this server: https://HOST, or * for all."),
    ] = None,
    weights_root: Annotated[
        Path | None,
        typer.Option(envvar="EAD_WEIGHTS_ROOT", help="Folder from which weights may be loaded."),
    ] = None,
    max_body_bytes: Annotated[int, typer.Option(help="Largest request body.")] = 32 << 20,
    max_answers: Annotated[int, typer.Option(help="Most answers to one request.")] = 4096,
    max_n: Annotated[int, typer.Option(help="Most answers to one prompt.")] = 128,
    drain_seconds: Annotated[
        float, typer.Option(help="Time for requests in progress after SIGTERM.")
    ] = 30.0,
    log_format: Annotated[
        str, typer.Option(envvar="EAD_LOG_FORMAT", help="Request log: text, json or off.")
    ] = "text",
    restart: Annotated[
        bool, typer.Option("--restart", help="Restart the server if it dies.")
    ] = False,
) -> None:
    """Start the extended SGLang server. Every SGLang flag is passed on.

    Without --model-path it serves SmolLM2-135M-Instruct; without a GPU it runs on the CPU.
    What changes the server (weights, schedule, step, aborts) is closed without an admin key.

    Example: ead serve --model-path smollm2 --annealing '{"preset": "paper"}' --port 30000

    SGLang's flags: python -m sglang.launch_server --help
    """
    import json

    from pydantic import ValidationError

    from ead_server.launch import serve
    from ead_server.settings import Settings

    if restart:
        from ead_server.launch.process import keep_alive

        command = [a for a in sys.argv[1:] if a != "--restart"]
        raise SystemExit(keep_alive([sys.executable, "-m", "ead_cli.main", *command]))
    try:
        settings = Settings.model_validate(
            {
                "api_key": read_key(api_key, api_key_file),
                "admin_api_key": read_key(admin_api_key, admin_api_key_file),
                "cors_origins": tuple(cors_origin or ()),
                "weights_root": weights_root,
                "max_body_bytes": max_body_bytes,
                "max_answers": max_answers,
                "max_n": max_n,
                "drain_seconds": drain_seconds,
                "log_format": log_format,
            }
        )
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        flag = str(first["loc"][0]).replace("_", "-").replace("origins", "origin")
        raise SystemExit(f"ead: --{flag}: {first['msg']}") from None
    with errors_as_messages():
        none = annealing is None or annealing.strip() in ("", "null")
        default = None if none else json.dumps(schedule_of(annealing))
        own = [flag for option in context.command.params for flag in option.opts]
        serve.serve(context.args, settings, default, own_flags=own)
