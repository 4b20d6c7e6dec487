"""Wall-clock of a training run that generates while it updates, against one that does one after
the other.

Both train the same model on the same task against one server each round, in turn; the ratio is of
seconds per step, the first steps of each run left out, since nothing was generated ahead of them.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from ead_cli.train import server_for
from ead_server.launch import models
from trainer_bridge.run.config import TrainConfig, read_config
from trainer_bridge.run.loop import train
from trainer_bridge.run.report import Display, read_metrics

EXAMPLE = [
    str(Path(__file__).parent.parent / "examples" / "products.toml"),
    "rollout.prompts_per_step=4",
]
SERIAL, PIPELINED = "one after the other", "generated while updating"
STALENESS = {SERIAL: 0, PIPELINED: 1}


def seconds_per_step(config: TrainConfig, folder: Path, server: object) -> float:
    with Display(Console(file=io.StringIO()), config.steps) as display:
        train(config, folder, server, display)  # type: ignore[arg-type]
    return statistics.mean(entry["time/step"] for entry in read_metrics(folder)[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", nargs="*", default=EXAMPLE, help="as of `ead train`")
    parser.add_argument("--steps", type=int, default=4, help="of each run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    console = Console(stderr=True)
    model = models.resolve(read_config(options.settings).model.path)
    seconds: dict[str, list[float]] = {mode: [] for mode in STALENESS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server_config = read_config(options.settings).server
        with server_for(server_config, model, folder, console.print) as server:
            for round_ in track(range(options.rounds), "rounds", console=console):
                modes = list(STALENESS.items())
                for mode, staleness in modes if round_ % 2 else reversed(modes):
                    config = read_config(
                        [
                            *options.settings,
                            f"model.path={model}",
                            f"steps={options.steps}",
                            f"seed={round_}",
                            f"rollout.staleness={staleness}",
                            "checkpoint.every=0",
                            "report.tensorboard=false",
                        ]
                    )
                    run = folder / f"{round_}-{staleness}"
                    seconds[mode].append(seconds_per_step(config, run, server))
    ratios = [a / b for a, b in zip(seconds[PIPELINED], seconds[SERIAL], strict=True)]
    if options.json:
        print(json.dumps({"ratios": {PIPELINED: statistics.median(ratios)}, "seconds": seconds}))
        return
    title = f"{options.steps} steps, {options.rounds} rounds"
    table = Table("", "seconds per step, median", "ratio median", "min", "max", title=title)
    for mode, values in seconds.items():
        cells = [f"{f(ratios):.3f}" for f in (statistics.median, min, max)]
        shown = cells if mode == PIPELINED else []
        table.add_row(mode, f"{statistics.median(values):.2f}", *shown)
    Console().print(table)


if __name__ == "__main__":
    main()
