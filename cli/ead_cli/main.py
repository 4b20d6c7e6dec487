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
    sampling_params,
    schedule_of,
)
from ead_cli.outputs import check_file, check_folder
from ead_cli.serve import serve

app = typer.Typer(
    help="Serve, sample and train with annealed temperatures: high at first, low at the end.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(models, name="models")


app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=True,
)(serve)


@app.command()
def demo(
    steps: Annotated[int, typer.Option(min=1, help="Number of GRPO steps.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for the picture and logs.")] = Path("runs/demo"),
    port: Annotated[int, typer.Option(help="Port of the server; 0 picks a free one.")] = 0,
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
        typer.Argument(help="TOML file, and settings such as optimizer.learning_rate=1e-5."),
    ] = None,
    folder: Annotated[Path, typer.Option(help="Folder for all files of the run.")] = Path(
        "runs/train"
    ),
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest checkpoint in the folder.")
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
        typer.Argument(help="TOML file, and settings such as evaluation.problems=200."),
    ] = None,
    folder: Annotated[Path, typer.Option(help="Folder for the log of the server.")] = Path(
        "runs/eval"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
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
    folder: Annotated[Path, typer.Argument(help="Folder of the run.")] = Path("runs/train"),
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
        typer.Argument(help="Schedules: JSON, a preset (recipe, paper) or a kind (cosine, ...)."),
    ] = None,
    step: Annotated[
        list[int] | None,
        typer.Option(
            min=0, help="Training step; repeat it for several. Default: that of the schedule, or 0."
        ),
    ] = None,
    length: Annotated[int, typer.Option(min=1, max=1_000_000, help="Number of tokens.")] = 512,
    entropy: Annotated[
        float, typer.Option(min=0, max=20, help="Entropy in nats, for schedules that use it.")
    ] = 1.0,
    table: Annotated[
        bool, typer.Option("--table", help="Print numbers instead of a plot.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write the plot to this .png or .svg file.")
    ] = None,
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
    question: Annotated[
        str | None, typer.Argument(help="Without a question, chat interactively.")
    ] = None,
    annealing: Scheduled = "paper",
    system: Annotated[str, typer.Option(help="System message.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 512,
    by: Annotated[
        str, typer.Option(help="What colours a token: temperature, entropy or surprise.")
    ] = "temperature",
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
    prompts: Annotated[
        Path, typer.Argument(help="File with one prompt per line: text (.txt) or JSON (.jsonl).")
    ],
    out: Annotated[
        Path, typer.Option(help="Output: a .jsonl file, or a folder for safetensors files.")
    ] = Path("rollouts.jsonl"),
    n: Annotated[
        int | None, typer.Option("-n", min=1, help="Number of answers to each prompt; default 1.")
    ] = None,
    annealing: Scheduled = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of an answer; default 512.")
    ] = None,
    sampling: Annotated[
        str, typer.Option(help='SGLang\'s sampling parameters as JSON, such as {"top_p": 0.9}.')
    ] = "{}",
    entropies: Annotated[
        bool, typer.Option("--entropies", help="Also return the entropy of every token.")
    ] = False,
    per_call: Annotated[
        int | None,
        typer.Option(min=1, help="Prompts per request; default 64, or fewer if they are long."),
    ] = None,
    url: Annotated[
        list[str] | None,
        typer.Option(envvar="EAD_URL", help="Server URL; repeat it for several servers."),
    ] = None,
    api_key: ApiKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")] = False,
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
    batch: Annotated[int, typer.Option(min=1, max=1024, help="Number of answers at once.")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 64,
    rounds: Annotated[
        int, typer.Option(min=1, help="Rounds to measure, after one to warm up.")
    ] = 5,
    url: Url = LOCAL,
    api_key: ApiKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure what annealing costs on a server that runs.

    Example: ead bench --batch 4 --tokens 8 --rounds 1 --json
    """
    from ead_cli.bench import bench as measure

    with errors_as_messages(), client_of(url, api_key) as client:
        measure(client, batch=batch, tokens=tokens, rounds=rounds, as_json=as_json)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
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
