"""What answers cost over HTTP: requests per second, bytes per token, time to read them.

Ours against plain SGLang, the same model on both; without --model a tiny random one.

    load         many connections at once to /v1/completions, whole answers and streams, all with
                 SGLang's log-probabilities; with `annealing` also the temperatures and both
                 log-probabilities, in SGLang's `logprobs` and as arrays. Requests per second
                 depend on whatever else the machine does; the server's CPU time hardly
    sizes        bytes per generated token of one prompt's answers: SGLang's /generate with
                 log-probabilities, and /v1/rollouts as JSON and as safetensors; each also as gzip,
                 ours as the server sends it, SGLang's (which it never compresses) made here
    big case     64 prompts x 16 answers x 1024 tokens, built from recorded shapes and not
                 generated (see benchmarks/bodies.py): bytes, and the client's time from bytes to
                 arrays, for token ids of SmolLM2's vocabulary and of one of 151,936

SGLang's answers hold the text, the token ids twice and one log-probability; ours the text, the
token ids once, two log-probabilities and the temperatures.

The load comes from this process, on the servers' own cores. The servers are asked in turn, round
after round, in an order that changes; ratios are within a round.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import random
import runpy
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import orjson
import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.bodies import ANSWERS, PROMPT, Bodies, big_case, milliseconds, read_native, recorded
from ead_client._rollouts import unpack
from ead_sampler import device
from ead_server.launch import models
from ead_server.launch.process import ServerProcess
from ead_server.launch.serve import with_defaults
from ead_server.rollouts import packing

Json = dict[str, Any]

PLAIN = "plain SGLang"
MODES: dict[str, Json] = {
    PLAIN: {},
    "nothing asked": {},
    "annealed": {"annealing": {"tau_max": 1.2, "tau_min": 0.8}},
}
KINDS: dict[str, Json] = {"whole": {}, "streamed": {"stream": True}}
VOCABULARIES = (49_152, 151_936)
# One thread for the model, which is tiny: threads that wait for each other would be what is
# measured, on cores that the HTTP processes need.
ENVIRON = {"OMP_NUM_THREADS": "1"}


class Compared(NamedTuple):
    """One number of plain SGLang and of ours, round by round."""

    name: str
    plain: list[float]
    ours: list[float]

    @property
    def ratios(self) -> list[float]:
        return [ours / plain for ours, plain in zip(self.ours, self.plain, strict=True)]


# --- load --------------------------------------------------------------------------------------


class Load(NamedTuple):
    """One run of requests against one server."""

    requests_per_second: float
    cpu_ms: float  # of all the server's processes, per request: hardly depends on other work
    p50_ms: float
    p99_ms: float


async def load(
    server: ServerProcess, fields: Json, connections: int, requests: int, tokens: int
) -> Load:
    body = {
        "model": "m",
        "prompt": PROMPT,
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 1,
        "logprobs": 0,
        **fields,
    }
    latencies: list[float] = []
    numbers = iter(range(requests))

    async def connection(client: httpx.AsyncClient) -> None:
        for _ in numbers:
            started = time.perf_counter()
            response = await client.post(f"{server.url}/v1/completions", json=body)
            latencies.append((time.perf_counter() - started) * 1e3)
            response.raise_for_status()
            if (b'"model_logprobs"' in response.content) != ("annealing" in fields):
                raise SystemExit(f"not what was asked for: {response.text[:500]}")

    async with httpx.AsyncClient(timeout=600) as client:
        started, cpu_before = time.perf_counter(), cpu_seconds(server)
        await asyncio.gather(*(connection(client) for _ in range(connections)))
        seconds, cpu = time.perf_counter() - started, cpu_seconds(server) - cpu_before
    p50, p99 = np.percentile(latencies, (50, 99))
    return Load(requests / seconds, cpu * 1e3 / requests, float(p50), float(p99))


def cpu_seconds(server: ServerProcess) -> float:
    """CPU time that the server's processes have used so far, all of them together."""
    process = psutil.Process(server.process.pid)
    times = [member.cpu_times() for member in (process, *process.children(recursive=True))]
    return float(sum(time.user + time.system for time in times))


def under_load(
    plain: ServerProcess, ours: ServerProcess, options: argparse.Namespace, console: Console
) -> Iterator[Compared]:
    runs = [(mode, kind) for kind in KINDS for mode in MODES]
    results: dict[tuple[str, str], list[Load]] = {run: [] for run in runs}
    connections = options.connections
    for round_ in track(range(options.rounds + 1), "load", console=console):
        for mode, kind in random.Random(round_).sample(runs, len(runs)):
            server = plain if mode == PLAIN else ours
            fields = {**MODES[mode], **KINDS[kind]}
            asyncio.run(load(server, fields, connections, connections, 4))  # wakes an idle server
            work = load(server, fields, connections, options.requests, options.tokens)
            result = asyncio.run(work)
            if round_ > 0:  # the first warms up
                results[mode, kind].append(result)
    names = ("requests/s", "server's CPU ms per request", "p50, ms", "p99, ms")
    for mode, kind in runs:
        if mode != PLAIN:
            columns = (zip(*results[m, kind], strict=True) for m in (PLAIN, mode))
            for name, without, with_ in zip(names, *columns, strict=True):
                yield Compared(f"{kind}, {mode}, {name}", list(without), list(with_))


# --- bytes, and reading them -------------------------------------------------------------------


def sizes(bodies: Bodies, tokens: int) -> Iterator[Compared]:
    count = ANSWERS * tokens
    native, compressed = len(bodies.native), len(gzip.compress(bodies.native, packing.GZIP_LEVEL))
    for form, size, gzip_size in (
        ("JSON", len(bodies.json), bodies.json_gzip_size),
        ("safetensors", len(bodies.safetensors), bodies.safetensors_gzip_size),
    ):
        yield Compared(form, [native / count], [size / count])
        yield Compared(f"{form}, gzip", [compressed / count], [gzip_size / count])


def of_the_big_case(
    bodies: Bodies, vocabulary: int, rounds: int, console: Console
) -> Iterator[Compared]:
    case = big_case(bodies, vocabulary)
    native, ours, without_text = ([len(body) / 1e6] for body in case)
    yield Compared("MB", native, ours)
    yield Compared("MB, ours without text", native, without_text)
    times: dict[str, list[float]] = {"orjson": [], "Python's json": [], "ours": []}
    for _ in track(range(rounds), "reading", console=console):
        for name, loads in (("orjson", orjson.loads), ("Python's json", json.loads)):
            times[name].append(milliseconds(partial(read_native, loads), case.native))
        times["ours"].append(milliseconds(unpack, case.ours))
    for name in ("orjson", "Python's json"):
        yield Compared(f"ms to read, {name}", times[name], times["ours"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", help="embedded name, folder or hub name; none: a tiny one, all overhead"
    )
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--requests", type=int, default=96, help="of one run under load")
    parser.add_argument("--tokens", type=int, default=32, help="per answer under load")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--recorded-tokens", type=int, default=256, help="per recorded answer")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    console = Console(stderr=True)
    device.choose()
    with tempfile.TemporaryDirectory() as folder:
        tests = Path(__file__).parents[1] / "tests"
        make_tiny_model = runpy.run_path(str(tests / "helpers" / "tiny.py"))["make_tiny_model"]
        tiny = ["--model-path", str(make_tiny_model(Path(folder) / "model")), "--dtype", "float32"]
        model = ["--model-path", models.resolve(options.model)] if options.model else tiny
        arguments = with_defaults([*model, "--max-total-tokens", "65536"], cpu=device.is_cpu())
        plain = ServerProcess(
            arguments,
            Path(folder) / "plain.log",
            command=(sys.executable, "-m", "sglang.launch_server"),
            environ={"SGLANG_PLUGINS": "none", **ENVIRON},
        )
        with plain, ServerProcess(arguments, Path(folder) / "ours.log", environ=ENVIRON) as ours:
            for name, server in (("plain", plain), ("our", ours)):
                with console.status(f"starting {name} server"):
                    server.wait_until_ready()
            run = f"{options.connections} connections, {options.requests} requests a round"
            load_title = f"{run}, {options.tokens} tokens each"
            results = {load_title: list(under_load(plain, ours, options, console))}
            bodies = recorded(plain.url, ours.url, options.recorded_tokens)
    size_title = f"bytes per token, 1 x {ANSWERS} x {options.recorded_tokens}"
    results[size_title] = list(sizes(bodies, options.recorded_tokens))
    for vocabulary in VOCABULARIES:
        title = f"64 x 16 x 1024 from recorded shapes, vocabulary {vocabulary:,}"
        results[title] = list(of_the_big_case(bodies, vocabulary, options.rounds, console))
    report(results, as_json=options.json)


def report(results: dict[str, list[Compared]], *, as_json: bool) -> None:
    if as_json:
        named = {f"{title}: {one.name}": one for title, found in results.items() for one in found}
        medians = {name: statistics.median(one.ratios) for name, one in named.items()}
        values = {name: {"plain": one.plain, "ours": one.ours} for name, one in named.items()}
        print(json.dumps({"ratios": medians, "values": values}))
        return
    for title, found in results.items():
        table = Table("", "plain", "ours", "ratio median", "min", "max", title=title)
        for one in found:
            cells = [f"{statistics.median(values):,.1f}" for values in (one.plain, one.ours)]
            spread = [f"{f(one.ratios):.3f}" for f in (statistics.median, min, max)]
            table.add_row(one.name, *cells, *spread)
        Console().print(table)


if __name__ == "__main__":
    main()
