"""`ead bench`: what annealing costs on a server that runs, in tokens per second."""

from __future__ import annotations

import json
import random
import resource
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from ead_client import Client, EadError

PLAIN = "plain"
_MODES: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "annealed": {"annealing": {}, "rollout": False},
    "annealed, with arrays": {"annealing": {}},
    "annealed, with arrays and entropies": {"annealing": {}, "rollout": {"entropies": True}},
}
_PROMPT = "Tell me of the sea, at length."


def bench(client: Client, *, batch: int, tokens: int, rounds: int, as_json: bool) -> None:
    """Ask for `batch` answers at once, in each of four ways, in an order that changes by round.

    The first round warms up and does not count.
    """
    _allow_files(batch)
    console = Console(stderr=True)
    found: dict[str, list[float]] = {mode: [] for mode in _MODES}
    for round_ in track(range(rounds + 1), "rounds", console=console):
        for mode in random.Random(round_).sample(list(_MODES), len(_MODES)):
            rate = _tokens_per_second(client, _MODES[mode], batch, tokens)
            if round_ > 0:
                found[mode].append(rate)
    ratios = {
        mode: [ours / plain for ours, plain in zip(rates, found[PLAIN], strict=True)]
        for mode, rates in found.items()
        if mode != PLAIN
    }
    if as_json:
        medians = {mode: statistics.median(values) for mode, values in ratios.items()}
        print(json.dumps({"ratios": medians, "tokens_per_second": found}))
        return
    title = f"{batch} answers at once, {tokens} tokens each, {rounds} rounds: median (min to max)"
    table = Table("requests", "tokens/s", "ratio to plain", title=title)
    for mode, rates in found.items():
        table.add_row(mode, _spread(rates, ".1f"), _spread(ratios.get(mode, []), ".2f"))
    Console().print(table)


def _allow_files(batch: int) -> None:
    """Let this process have a connection for each answer. Raises EadError."""
    wanted = batch + 128  # for all else that is open
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise EadError(f"--batch: {batch} answers at once need {wanted} open files of {hard}")
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _tokens_per_second(client: Client, fields: dict[str, Any], batch: int, tokens: int) -> float:
    def one(number: int) -> int:
        # a prompt of its own, since the prefix cache would know it from the round before
        prompt = f"{random.getrandbits(64):x} {number} {_PROMPT}"
        body = {"model": client.model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
        answer = client.request("POST", "/v1/completions", {**body, **fields}).json()
        return int(answer["usage"]["completion_tokens"])

    started = time.perf_counter()
    pool = ThreadPoolExecutor(batch)
    try:
        count = sum(pool.map(one, range(batch)))
    finally:  # after Ctrl-C or an error, the other answers are not waited for
        pool.shutdown(wait=False, cancel_futures=True)
    return count / (time.perf_counter() - started)


def _spread(values: list[float], form: str) -> str:
    if not values:
        return ""
    median = statistics.median(values)
    return f"{median:{form}} ({min(values):{form}} to {max(values):{form}})"
