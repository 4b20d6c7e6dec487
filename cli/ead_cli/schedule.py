"""`ead schedule`: schedules as a plot or a table in the terminal, as PNG, SVG or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ead_client import EadError
from ead_client._fields import named_schedule
from ead_sampler import PRESETS, REGISTRY, AnnealingError, parse_annealing
from ead_server.annealing import preview

Curves = Mapping[str, Sequence[float]]


def parsed(text: str) -> dict[str, Any]:
    """A schedule as it is typed: JSON, the name of a preset, or that of a kind. Raises EadError."""
    try:
        return _parsed(text)
    except AnnealingError as error:
        raise EadError(str(error)) from None


def _parsed(text: str) -> dict[str, Any]:
    raw = named_schedule(text)
    if raw == {"schedule": text} and text not in REGISTRY:
        names = ", ".join([*PRESETS, *REGISTRY])
        raise AnnealingError("annealing", f"must be JSON or one of {names}, got {text!r}")
    parse_annealing(raw)
    return raw


def curves(
    schedules: Sequence[str], steps: Sequence[int], length: int, entropy: float
) -> dict[str, list[float]]:
    """The temperatures of each schedule at each step, under a name for people.

    steps: none: each schedule's own, or 0.
    """
    found = {}
    for text in schedules:
        schedule = parse_annealing(parsed(text))
        for step, taus in preview.temperatures(schedule, steps, length, entropy).items():
            found[text if len(steps) <= 1 else f"{text}, step {step}"] = taus
    return found


def show(found: Curves, *, as_table: bool, as_json: bool, out: Path | None) -> None:
    """To the file if there is one, else to the terminal."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".png":
            _draw(found, out)
        else:
            out.write_text(preview.svg("temperature by token", found))
        print(out)
    elif as_json:
        print(json.dumps({"temperatures": found}))
    elif as_table or not sys.stdout.isatty():
        Console(soft_wrap=True, markup=False, emoji=False).print(_table(found))
    else:
        _plot(found)


def _table(found: Curves) -> Table:
    """At tokens that are about as far apart as they are from the first."""
    length = max(map(len, found.values()))
    round_ = {m * 10**e for e in range(7) for m in (1, 2, 5)}
    table = Table("t", *found)
    for t in sorted({t for t in round_ if t < length} | {0, length - 1}):
        table.add_row(str(t), *(f"{taus[t]:.3f}" for taus in found.values()))
    return table


def _plot(found: Curves) -> None:
    import plotext

    console = Console()
    figure = plotext.figure
    figure.clear()
    figure.plot_size(min(console.width, 110), min(console.height - 2, 24))
    figure.theme("simple")
    length, top = max(map(len, found.values())), 1.05 * max(map(max, found.values()))
    for name, taus in found.items():
        every = max(1, len(taus) // 400)
        positions = list(range(0, len(taus), every))
        signal = figure.signal(positions, taus[::every], marker="braille").lines().label(name)
        figure.draw(signal)
    figure.ruler("y").lim(0, top)
    figure.legend(x=length - 1, y=top, ha="right", relative=True)
    figure.label("generated token")
    figure.title("temperature")
    figure.show(colorless=console.no_color)


def _draw(found: Curves, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    for name, taus in found.items():
        axis.plot(taus, label=name)
    axis.set(xlabel="generated token", ylabel="temperature", ylim=(0, None))
    axis.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)
