"""The `ead` command. Imports stay inside the commands: SGLang's child processes re-import this."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

try:
    import typer
except ImportError:  # the bare install is the client library
    raise SystemExit("the ead command needs: pip install 'ead[server]' or 'ead[trainer]'") from None

from ead_cli.models import models
from ead_cli.options import (
    INTERRUPTED,
    LOCAL,
    ApiKey,
    Scheduled,
    Url,
    client_of,
    errors_as_messages,
    read_key,
    sampling_params,
    schedule_of,
)
from ead_cli.outputs import check_file, check_folder

app = typer.Typer(
    help="Exploratory Annealed Decoding: hot early tokens, cool late ones, over HTTP.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(models, name="models")


# long, since each flag of the command is a parameter of its function
@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=True,
)
def serve(
    context: typer.Context,
    annealing: Annotated[
        str | None,
        typer.Option(
            envvar="EAD_ANNEALING",
            help="Schedule of requests that name none: JSON, a preset, or a kind.",
        ),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="EAD_API_KEY", help="Asked of every call but health.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(envvar="EAD_API_KEY_FILE", help="A file that holds it.")
    ] = None,
    admin_api_key: Annotated[
        str | None,
        typer.Option(envvar="EAD_ADMIN_API_KEY", help="For weights, schedule, step, aborts."),
    ] = None,
    admin_api_key_file: Annotated[
        Path | None, typer.Option(envvar="EAD_ADMIN_API_KEY_FILE", help="A file that holds it.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="A site whose pages may call this server, https://HOST; *: all."),
    ] = None,
    weights_root: Annotated[
        Path | None,
        typer.Option(envvar="EAD_WEIGHTS_ROOT", help="Folder that weights may be loaded from."),
    ] = None,
    max_body_bytes: Annotated[int, typer.Option(help="Of one request.")] = 32 << 20,
    max_answers: Annotated[int, typer.Option(help="Prompts times n of one request.")] = 4096,
    max_n: Annotated[int, typer.Option(help="Answers to one prompt.")] = 128,
    drain_seconds: Annotated[
        float, typer.Option(help="For answers in progress when the server is told to end.")
    ] = 30.0,
    log_format: Annotated[
        str, typer.Option(envvar="EAD_LOG_FORMAT", help="One line per request: text, json or off.")
    ] = "text",
    restart: Annotated[
        bool, typer.Option("--restart", help="Start again when the server dies.")
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
        default = json.dumps(schedule_of(annealing)) if annealing else None
        own = [flag for option in context.command.params for flag in option.opts]
        serve.serve(context.args, settings, default, own_flags=own)


@app.command()
def demo(
    steps: Annotated[int, typer.Option(min=1, help="GRPO steps.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for the picture and logs.")] = Path("runs/demo"),
    port: Annotated[int, typer.Option(help="Port; 0 picks a free one.")] = 0,
) -> None:
    """Serve, chat, train a few GRPO steps and draw what happened. Stops what it started.

    Example: ead demo --steps 1
    """
    check_folder(out.parent, "--out")  # a folder that is there already gets one beside it
    with errors_as_messages(go_on="its server is stopped"):
        from ead_cli.demo import run

        run(steps=steps, out=out, port=port)


@app.command()
def train(
    config: Annotated[
        list[str] | None,
        typer.Argument(help="A TOML file, and settings such as optimizer.learning_rate=1e-5."),
    ] = None,
    folder: Annotated[Path, typer.Option(help="For everything that the run leaves.")] = Path(
        "runs/train"
    ),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in the folder.")
    ] = False,
) -> None:
    """Train a policy by GRPO on annealed rollouts. Starts a server if `server.url` names none.

    Several GPUs: torchrun --nproc-per-node 8 -m ead_cli.main train config.toml

    Example: ead train examples/products.toml steps=2 --folder runs/products
    """
    check_folder(folder, "--folder")
    with errors_as_messages(go_on=_resumed(config or [], folder)):
        from ead_cli import train

        train.run(config or [], folder, resume=resume)


def _resumed(config: list[str], folder: Path) -> str:
    """How to go on with a run that was stopped."""
    if "RANK" in os.environ:
        return "go on with the same torchrun command and --resume"
    command = ["ead", "train", *config, "--folder", str(folder), "--resume"]
    return f"go on with: {shlex.join(command)}"


@app.command("eval")
def evaluate(
    config: Annotated[
        list[str] | None,
        typer.Argument(help="A TOML file, and settings such as evaluation.problems=200."),
    ] = None,
    folder: Annotated[Path, typer.Option(help="For a server's log.")] = Path("runs/eval"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Measure pass@k, worst@k, maj@k and the mean reward on held-out problems.

    The settings are those of `ead train`; the section `evaluation` says how many problems and
    answers, and how they are decoded.

    Example: ead eval examples/products.toml evaluation.problems=16 --json
    """
    check_folder(folder, "--folder")
    with errors_as_messages(go_on="nothing is kept of this evaluation"):
        from ead_cli import train

        train.run_evaluation(config or [], folder, as_json=as_json)


@app.command()
def plot(
    folder: Annotated[Path, typer.Argument(help="Of a run.")] = Path("runs/train"),
) -> None:
    """Draw a run's curves again and say where they are.

    Example: ead plot runs/products
    """
    check_file(folder / "curves.png", "FOLDER")
    from trainer_bridge.run.report import draw_curves

    with errors_as_messages():
        print(draw_curves(folder))


@app.command()
def schedule(
    schedules: Annotated[
        list[str] | None,
        typer.Argument(help="JSON, a preset (recipe, paper) or a kind (cosine, ...); several."),
    ] = None,
    step: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Training step; several. None: the schedule's own, or 0."),
    ] = None,
    length: Annotated[int, typer.Option(min=1, max=1_000_000, help="Tokens.")] = 512,
    entropy: Annotated[
        float, typer.Option(min=0, max=20, help="Nats, for schedules that look at it.")
    ] = 1.0,
    table: Annotated[bool, typer.Option("--table", help="Numbers in place of a plot.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    out: Annotated[Path | None, typer.Option(help="A .png or .svg file.")] = None,
) -> None:
    """Show temperatures by token, of one schedule or of several to compare.

    Example: ead schedule paper cosine --step 0 --step 400 --length 1024
    """
    from ead_cli import schedule

    if out is not None and out.suffix not in (".png", ".svg"):
        raise SystemExit(f"ead: --out: must end in .png or .svg, got {out}")
    if out is not None:
        check_file(out, "--out")
    with errors_as_messages():
        found = schedule.curves(schedules or ["recipe"], step or [], length, entropy)
        schedule.show(found, as_table=table, as_json=as_json, out=out)


@app.command()
def chat(
    question: Annotated[str | None, typer.Argument(help="None: type as many as you like.")] = None,
    annealing: Scheduled = "paper",
    system: Annotated[str, typer.Option(help="System message.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 512,
    by: Annotated[str, typer.Option(help="Colour: temperature, entropy or surprise.")] = (
        "temperature"
    ),
    url: Url = LOCAL,
    api_key: ApiKey = None,
) -> None:
    """Chat with a server; every token comes in the colour of its temperature.

    Example: ead chat "Why is the sea salty?" --annealing paper --by entropy
    """
    from ead_cli.chat import COLUMNS
    from ead_cli.chat import chat as talk

    if by not in COLUMNS:
        raise SystemExit(f"ead: --by: must be one of {', '.join(COLUMNS)}, got {by!r}")
    with errors_as_messages(), client_of(url, api_key) as client:
        asked = schedule_of(annealing)
        talk(client, question, annealing=asked, system=system, max_tokens=max_tokens, by=by)


@app.command()
def rollout(
    prompts: Annotated[Path, typer.Argument(help="Lines of text (.txt), or of JSON (.jsonl).")],
    out: Annotated[
        Path, typer.Option(help="A .jsonl file, or a folder for safetensors files.")
    ] = Path("rollouts.jsonl"),
    n: Annotated[
        int | None, typer.Option("-n", min=1, help="Answers to each prompt; default 1.")
    ] = None,
    annealing: Scheduled = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of an answer; default 512.")
    ] = None,
    sampling: Annotated[
        str, typer.Option(help='JSON of SGLang\'s sampling parameters, as {"top_p": 0.9}.')
    ] = "{}",
    entropies: Annotated[bool, typer.Option("--entropies", help="Of every token too.")] = False,
    per_call: Annotated[
        int | None,
        typer.Option(min=1, help="Prompts in one request; default 64, or as few as fit in it."),
    ] = None,
    url: Annotated[
        list[str] | None, typer.Option(envvar="EAD_URL", help="Of the server, or of several.")
    ] = None,
    api_key: ApiKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="Counts as JSON on stdout.")] = False,
) -> None:
    """Have a file of prompts answered. The same call again goes on where it was stopped.

    Example: ead rollout prompts.txt -n 8 --annealing paper --out answers.jsonl
    """
    import json

    from ead_cli.rollout import Asked, collect
    from ead_cli.rollout_prompts import read_prompts

    go_on = f"what was answered is in {out}, and the same command again goes on from there"
    with errors_as_messages(go_on=go_on), client_of(url or LOCAL, api_key) as client:
        params = sampling_params(sampling, {"n": n, "max_new_tokens": max_new_tokens})
        answers = params.pop("n", 1)
        asked = Asked(answers, schedule_of(annealing), entropies, {"max_new_tokens": 512, **params})
        counts = collect(client, prompts, read_prompts(prompts), asked, out, per_call=per_call)
    if as_json:
        print(json.dumps({**counts, "out": str(out)}))
    else:
        print(f"{counts['prompts'] - counts['failed']} of {counts['prompts']} prompts in {out}")
    if counts["failed"]:
        raise typer.Exit(1)


@app.command()
def bench(
    batch: Annotated[int, typer.Option(min=1, max=1024, help="Answers at once.")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Beside one to warm up.")] = 5,
    url: Url = LOCAL,
    api_key: ApiKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Measure what annealing costs on a server that runs.

    Example: ead bench --batch 4 --tokens 8 --rounds 1 --json
    """
    from ead_cli.bench import bench as measure

    with errors_as_messages(), client_of(url, api_key) as client:
        measure(client, batch=batch, tokens=tokens, rounds=rounds, as_json=as_json)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Say what is installed, check it against SGLang, and sample a little. Status 1 if wrong.

    Example: ead doctor --json
    """
    from ead_cli.doctor import examine, report

    if not report(examine(), as_json=as_json):
        raise typer.Exit(1)


# what the extras bring of which a command of another extra may ask
_OF_EXTRAS = frozenset(
    (
        "sglang",
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "gguf",
        "reasoning_gym",
        "math_verify",
    )
)


def main() -> None:
    try:
        app()
    except SystemExit as end:
        if end.code == INTERRUPTED:  # without waiting for threads whose answers nobody wants
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(INTERRUPTED)
        raise
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _OF_EXTRAS:  # another fault, with its trace
            raise
        raise SystemExit(
            f"ead: {error.name} is not installed, and this command needs it: pip install "
            "'ead[server]' to serve on this machine, 'ead[trainer]' to train or to draw schedules"
        ) from None


if __name__ == "__main__":
    main()
