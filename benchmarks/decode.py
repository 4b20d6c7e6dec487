"""Tokens per second of the whole server, and its memory: plain SGLang, ours, ours annealing.

Two servers on the same model run side by side and are asked in turn, round after round, so that a
machine that slows down slows all of them; the order changes from round to round. Idle servers
sleep, so each measurement follows a short request to the same server.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ead_sampler import device
from ead_server.launch import models
from ead_server.launch.process import ServerProcess
from ead_server.launch.serve import with_defaults

PLAIN = "plain SGLang"
MODES: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "ours, nothing asked": {},
    "ours, annealed": {"annealing": {"tau_max": 1.2, "tau_min": 0.8}, "rollout": False},
    "ours, annealed, arrays": {"annealing": {"tau_max": 1.2, "tau_min": 0.8}},
}


def tokens_per_second(url: str, batch: int, tokens: int, fields: dict[str, Any]) -> float:
    body = {
        "model": "m",
        "prompt": ["The sea is"] * batch,
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 1,
        "logprobs": 0,
        **fields,
    }
    started = time.perf_counter()
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=600)
    seconds = time.perf_counter() - started
    response.raise_for_status()
    return float(response.json()["usage"]["completion_tokens"] / seconds)


def mebibytes(server: ServerProcess) -> float:
    """Memory that only this server's processes use, all of them together."""
    process = psutil.Process(server.process.pid)
    family = [process, *process.children(recursive=True)]
    return sum(member.memory_full_info().uss for member in family) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="embedded name, folder or hub name")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--tokens", type=int, default=32, help="per answer")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    console = Console(stderr=True)
    device.choose()
    arguments = with_defaults(["--model-path", models.resolve(options.model)], cpu=device.is_cpu())
    runs = [(mode, batch) for batch in options.batch for mode in MODES]
    rates: dict[tuple[str, int], list[float]] = {run: [] for run in runs}
    with tempfile.TemporaryDirectory() as folder:
        plain = ServerProcess(
            arguments,
            Path(folder) / "plain.log",
            command=(sys.executable, "-m", "sglang.launch_server"),
            environ={"SGLANG_PLUGINS": "none"},
        )
        with plain, ServerProcess(arguments, Path(folder) / "ours.log") as ours:
            for name, server in (("plain", plain), ("ours", ours)):
                with console.status(f"starting the {name} server"):
                    server.wait_until_ready()
            for round_ in track(range(options.rounds + 1), "rounds", console=console):
                for mode, batch in random.Random(round_).sample(runs, len(runs)):
                    url = (plain if mode == PLAIN else ours).url
                    tokens_per_second(url, batch, 4, MODES[mode])  # wakes an idle server
                    rate = tokens_per_second(url, batch, options.tokens, MODES[mode])
                    if round_ > 0:  # the first warms up
                        rates[mode, batch].append(rate)
            memory = {PLAIN: mebibytes(plain), "ours": mebibytes(ours)}
    ratios = {
        run: [ours / plain for ours, plain in zip(rates[run], rates[PLAIN, run[1]], strict=True)]
        for run in runs
        if run[0] != PLAIN
    }
    if options.json:
        medians = {
            f"{mode}, batch {batch}": statistics.median(values)
            for (mode, batch), values in ratios.items()
        }
        medians["memory"] = memory["ours"] / memory[PLAIN]
        named = {f"{mode}, batch {batch}": values for (mode, batch), values in rates.items()}
        print(json.dumps({"ratios": medians, "tokens_per_second": named, "mebibytes": memory}))
        return
    title = f"{options.tokens} tokens each, {options.rounds} rounds"
    table = Table("batch", "mode", "tokens/s median", "ratio median", "min", "max", title=title)
    for (mode, batch), values in rates.items():
        spread = ratios.get((mode, batch))
        cells = [f"{f(spread):.3f}" for f in (statistics.median, min, max)] if spread else []
        table.add_row(str(batch), mode, f"{statistics.median(values):.1f}", *cells)
    Console().print(table)
    print(", ".join(f"{name}: {value:,.0f} MiB" for name, value in memory.items()))


if __name__ == "__main__":
    main()
