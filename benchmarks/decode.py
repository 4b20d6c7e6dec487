"""Tokens per second of the whole server: plain SGLang, ours, and ours with annealing.

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
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ead_sampler import device
from ead_server import models
from ead_server.launch import with_defaults
from ead_server.process import ServerProcess

MODES: dict[str, dict[str, Any]] = {
    "plain SGLang": {},
    "ours, nothing asked": {},
    "ours, rollout": {"rollout": True},
    "ours, annealed": {"annealing": {"tau_max": 1.2, "tau_min": 0.8}},
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="embedded name, folder or hub name")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32, help="per answer")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    console = Console(stderr=True)
    device.choose()
    arguments = with_defaults(["--model-path", models.resolve(options.model)], cpu=device.is_cpu())
    rates: dict[str, list[float]] = {mode: [] for mode in MODES}
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
                order = list(MODES.items())
                random.Random(round_).shuffle(order)
                for mode, fields in order:
                    url = (plain if mode == "plain SGLang" else ours).url
                    tokens_per_second(url, options.batch, 4, fields)  # wakes an idle server
                    rate = tokens_per_second(url, options.batch, options.tokens, fields)
                    if round_ > 0:  # the first warms up
                        rates[mode].append(rate)
    baseline = rates["plain SGLang"]
    ratios = {
        mode: [ours / plain for ours, plain in zip(rates[mode], baseline, strict=True)]
        for mode in MODES
        if mode != "plain SGLang"
    }
    if options.json:
        medians = {mode: statistics.median(values) for mode, values in ratios.items()}
        print(json.dumps({"ratios": medians, "tokens_per_second": rates}))
        return
    title = f"batch {options.batch}, {options.tokens} tokens each, {options.rounds} rounds"
    table = Table("mode", "tokens/s median", "ratio median", "min", "max", title=title)
    for mode, values in rates.items():
        spread = (
            [f"{f(ratios[mode]):.3f}" for f in (statistics.median, min, max)]
            if mode in ratios
            else []
        )
        table.add_row(mode, f"{statistics.median(values):.1f}", *spread)
    Console().print(table)


if __name__ == "__main__":
    main()
