"""The server under bad luck and bad will, for long: what it keeps of it, and how it dies.

    memory       requests of all kinds at full speed, on every route that takes a body: good ones,
                 bad ones, ones whose client leaves, and huge ones. Then the resident memory of each
                 process of the server against the start, where a few of each kind had been sent.
                 By what kind it grew, says --kinds
    dying        each process is killed, and each is stopped, in each state of the server; the main
                 one is told to end. What its client saw, after how many seconds it had heard of it
                 and no process was left, and the server's exit status (see benchmarks/dying.py)

All on a tiny model. Exit status 1 when a process grew by more than 100 MiB, or a row took longer
than 10 s, left something running, or had another exit status than it should.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import runpy
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import orjson
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks import dying
from benchmarks.dying import FLAGS, LIMIT_SECONDS, PROCESSES, STATES, Case, Row, tried
from ead_sampler import device
from ead_server.launch.process import ServerProcess

Json = dict[str, Any]

LIMIT_BYTES = 100 << 20  # that a process may grow by
CONNECTIONS = 16
GOOD, BAD, LEFT, HUGE = "good", "bad", "left by the client", "huge"
# how often each is drawn; a huge one costs as much as many others
WEIGHTS = {GOOD: 10, BAD: 6, LEFT: 4, HUGE: 1}
ANNEALED = {"annealing": {"preset": "paper", "step": 3}}
ROUTES: dict[str, Json] = {
    "/v1/completions": {"model": "m", "prompt": "x", "max_tokens": 16, **ANNEALED},
    "/v1/chat/completions": {
        "model": "m",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 16,
        "stream": True,
        **ANNEALED,
    },
    "/generate": {"text": "x", "sampling_params": {"max_new_tokens": 16, **ANNEALED}},
    "/v1/rollouts": {
        "prompts": ["x", [5, 6]],
        "n": 4,
        "sampling_params": {"max_new_tokens": 16},
        **ANNEALED,
    },
    "/v1/responses": {"model": "m", "input": "x", "max_output_tokens": 16},
    "/v1/messages": {
        "model": "m",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 16,
    },
    "/tokenize": {"model": "m", "prompt": "x"},
    "/v1/weights/disk": {"version": "1", "folder": "/nowhere"},
    "/v1/annealing": {"step": 2},
}
PUT = ("/v1/annealing",)
TEXTS = ("prompt", "text", "input", "content", "prompts")  # fields that a huge request fills


def body_of(kind: str, path: str, draw: random.Random) -> bytes:
    """One request of this kind."""
    body = json.loads(json.dumps(ROUTES[path]))
    if kind == BAD:
        if draw.random() < 0.3:
            return orjson.dumps(body)[: draw.randrange(1, 40)]
        name = draw.choice([*body, "n", "stop", "logit_bias", "annealing"])
        body[name] = draw.choice([None, -1, 1e30, "\0", [], {}, [[[]]], ["s"] * 999, {"a": [1]}])
    elif kind == HUGE:
        _fill(body, "x " * draw.choice([100_000, 1_000_000, 5_000_000]), draw.random() < 0.3)
    elif kind == LEFT:
        _lengthen(body)
    return orjson.dumps(body)


def _fill(body: Any, text: str, as_list: bool) -> None:
    for name in TEXTS:
        if name in body:
            body[name] = [text[:8]] * (len(text) // 20) if as_list or name == "prompts" else text
            return
    for value in body.values():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value[0]["content"] = text


def _lengthen(body: Json) -> None:
    for name in ("max_tokens", "max_output_tokens", "max_new_tokens"):
        if name in body:
            body[name] = 2000
    if isinstance(params := body.get("sampling_params"), dict):
        params["max_new_tokens"] = 2000


async def send(client: httpx.AsyncClient, kind: str, path: str, draw: random.Random) -> str:
    """The status, or what else came of it."""
    patience = draw.uniform(0.05, 0.5) if kind == LEFT else 300.0
    method = "PUT" if path in PUT else "POST"
    content = body_of(kind, path, draw)
    try:
        async with asyncio.timeout(patience):
            return str((await client.request(method, path, content=content)).status_code)
    except TimeoutError:
        return "left"
    except httpx.HTTPError as error:
        return type(error).__name__


async def flood(server: ServerProcess, until: float, seed: int, kinds: dict[str, int]) -> Counter:
    """Requests from all connections until then: how many of (kind, route, outcome)."""
    counts: Counter[tuple[str, str, str]] = Counter()
    headers = {**server.admin_headers, "content-type": "application/json"}

    async def one(index: int) -> None:
        draw = random.Random(f"{seed}-{index}")
        async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=300) as client:
            while time.monotonic() < until:
                (kind,) = draw.choices([*kinds], [*kinds.values()])
                path = draw.choice([*ROUTES])
                counts[kind, path, await send(client, kind, path, draw)] += 1

    await asyncio.gather(*(one(index) for index in range(CONNECTIONS)))
    return counts


def resident(server: ServerProcess) -> dict[str, int]:
    """Bytes, by process."""
    main = psutil.Process(server.process.pid)
    found = {"main": main.memory_info().rss}
    for process in main.children(recursive=True):
        name = " ".join(process.cmdline()).split()[0]
        if name.startswith("sglang::"):
            found[name.removeprefix("sglang::")] = process.memory_info().rss
    return found


def memory(model: Path, folder: Path, options: argparse.Namespace, console: Console) -> list[Json]:
    """For each kind, or all at once: requests sent, outcomes, resident bytes before and after."""
    mixes = [{kind: 1} for kind in WEIGHTS] if options.kinds else [WEIGHTS]
    arguments = ["--model-path", str(model), *FLAGS, "--log-format", "off"]
    found = []
    with ServerProcess([*arguments, "--weights-root", str(folder)], folder / "soak.log") as server:
        with console.status("starting a server"):
            server.wait_until_ready()
        with console.status("a little of all kinds first"):
            asyncio.run(flood(server, time.monotonic() + 20, options.seed + 1, WEIGHTS))
            dying.wait_for(lambda: not dying.generates(server), 120)
        for kinds in mixes:
            before = resident(server)
            seconds = options.minutes * 60 / len(mixes)
            with console.status(f"{', '.join(kinds)}: {seconds / 60:.1f} minutes"):
                until = time.monotonic() + seconds
                counts = asyncio.run(flood(server, until, options.seed, kinds))
                dying.wait_for(lambda: not dying.generates(server), 120)
            outcomes: Counter[str] = Counter()
            for (_, path, outcome), number in counts.items():
                # of the server's own errors, also where
                outcomes[f"{outcome} {path}" if outcome[0] == "5" else outcome] += number
            found.append(
                {
                    "kinds": list(kinds),
                    "requests": counts.total(),
                    "outcomes": dict(outcomes.most_common()),
                    "before": before,
                    "after": resident(server),
                }
            )
            grown = ", ".join(f"{name} {size >> 20} MiB" for name, size in grew(found[-1]).items())
            console.print(f"{', '.join(kinds)}: {counts.total():,} requests; grew: {grown}")
    return found


def grew(one: Json) -> dict[str, int]:
    """Bytes, by process."""
    return {name: one["after"].get(name, 0) - size for name, size in one["before"].items()}


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """All that were asked for."""
    numbers = (signal.SIGKILL, signal.SIGSTOP, *dying.TO_END)
    for process, state, number in product(options.processes, options.states, numbers):
        if (case := Case(process, number, state)).possible:
            yield case


def table_of_dying(
    model: Path, folder: Path, options: argparse.Namespace, console: Console
) -> list[Row]:
    """Row by row; the next case's server starts while one is tried."""
    rows: list[Row] = []
    waiting = list(cases(options))
    servers = [waiting[0].server(model, folder)] if waiting else []
    try:
        for number, case in enumerate(waiting, 1):
            server = servers.pop()
            with console.status(f"{number} of {len(waiting)}: {case}"):
                server.wait_until_ready()
                servers += [after.server(model, folder) for after in waiting[number : number + 1]]
                rows.append(tried(case, server, model))
            row = rows[-1]
            console.print(f"{case}: {row.saw}, {row.seconds:.1f} s{'' if row.right else ' WRONG'}")
    finally:
        for server in servers:
            server.stop(0.0)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="of requests; 0: none")
    parser.add_argument("--kinds", action="store_true", help="one kind of request after the other")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", nargs="*", choices=PROCESSES, default=[*PROCESSES])
    parser.add_argument("--states", nargs="*", choices=STATES, default=[*STATES])
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    console = Console(stderr=True)
    device.choose()  # before anything imports transformers, see ead_sampler/device.py
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tests = Path(__file__).parents[1] / "tests"
        model = runpy.run_path(str(tests / "helpers" / "tiny.py"))["make_tiny_model"](
            folder / "model"
        )
        kept = memory(model, folder, options, console) if options.minutes else []
        rows = table_of_dying(model, folder, options, console)
    report(kept, rows, as_json=options.json)
    right = all(size <= LIMIT_BYTES for one in kept for size in grew(one).values())
    sys.exit(0 if right and all(row.right for row in rows) else 1)


def report(kept: list[Json], rows: list[Row], *, as_json: bool) -> None:
    if as_json:
        told = [
            {**asdict(row), "case": str(row.case), "right": row.right, "limit": LIMIT_SECONDS}
            for row in rows
        ]
        print(json.dumps({"memory": [{**one, "grew": grew(one)} for one in kept], "dying": told}))
        return
    for one in kept:
        outcomes = ", ".join(f"{number:,} {what}" for what, number in one["outcomes"].items())
        title = f"{one['requests']:,} requests ({', '.join(one['kinds'])}): {outcomes}"
        table = Table("process", "MiB before", "after", "grew", title=title)
        for process, size in grew(one).items():
            cells = [one["before"][process], one["after"].get(process, 0), size]
            table.add_row(process, *(f"{cell / 2**20:,.0f}" for cell in cells))
        Console().print(table)
    if rows:
        columns = ("process", "signal", "state", "its client saw", "seconds", "left", "status", "")
        table = Table(*columns, title="dying")
        for row in rows:
            case, status = row.case, "runs on" if row.status is None else str(row.status)
            cells = [case.process, case.number.name, case.state, row.saw, f"{row.seconds:.1f}"]
            cells += [", ".join(row.left), status, "" if row.right else "WRONG"]
            table.add_row(*cells)
        Console().print(table)


if __name__ == "__main__":
    main()
