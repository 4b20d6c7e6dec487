"""Log-probabilities from hidden states, forward and backward: time and peak memory.

    naive   log_softmax over whole logits, then gather
    TRL     its selective_log_softmax over whole logits, as its trainers call it: [8, N / 8, V]
    ours    linear_logprobs, which computes the entropies too, asked for or not

Two cases: log-probabilities at temperature 1, and those, the ones at a temperature per token and
the entropies, all with gradients. Gradients are of hidden states and head.

Every contender has a process of its own. Memory is what the peak of a fresh process adds to what
it holds when its inputs exist: resident memory, on a GPU what torch allocated. Times are of later
rounds, in an order that changes from round to round; ratios are ours by theirs, within a round.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import re
import runpy
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from trainer_bridge.algorithms.logprobs import linear_logprobs

OURS = "ours"
TRL_ROWS = 8  # sequences that its trainers would compute at once


class Case(NamedTuple):
    """What is computed, and from what."""

    everything: bool  # log-probabilities at a temperature per token and entropies as well
    tokens: int
    vocabulary: int
    hidden: int
    dtype: str

    @property
    def contenders(self) -> list[str]:
        return [OURS, "naive"] if self.everything else [OURS, "naive", "TRL"]

    def __str__(self) -> str:
        what = "all three" if self.everything else "log-probabilities"
        return f"{what}, V {self.vocabulary:,}, H {self.hidden:,}, N {self.tokens:,}, {self.dtype}"


# --- in a contender's own process ----------------------------------------------------------------

Function = Callable[[Tensor, Tensor, Tensor, Tensor | None], list[Tensor]]


def naive(hidden: Tensor, weight: Tensor, targets: Tensor, tau: Tensor | None) -> list[Tensor]:
    logits = (hidden @ weight.T).float()
    log_p = logits.log_softmax(dim=-1)
    at_target = log_p.gather(1, targets[:, None])
    if tau is None:
        return [at_target]
    tempered = (logits / tau[:, None]).log_softmax(dim=-1).gather(1, targets[:, None])
    return [at_target, tempered, -(log_p.exp() * log_p).sum(dim=-1)]


def ours(hidden: Tensor, weight: Tensor, targets: Tensor, tau: Tensor | None) -> list[Tensor]:
    results = linear_logprobs(hidden, weight, targets, temperatures=tau)
    return [results.logprobs] if tau is None else [*results]


def trl() -> Function:
    """From the wheel that `make venv` downloads; on a GPU without TRL's own Triton kernel."""
    tests = Path(__file__).parents[1] / "tests"
    selective_log_softmax = (
        runpy.run_path(str(tests / "trainers.py"))["functions"](
            "trl",
            "trl/trainer/utils.py",
            "selective_log_softmax",
            F=torch.nn.functional,
            is_triton_available=lambda: False,
        )
    ).selective_log_softmax

    def function(
        hidden: Tensor, weight: Tensor, targets: Tensor, tau: Tensor | None
    ) -> list[Tensor]:
        rows = targets.view(TRL_ROWS, -1)
        return [selective_log_softmax((hidden @ weight.T).view(*rows.shape, -1), rows)]

    return function


def serve(pipe: Connection, name: str, on: str) -> None:
    """Measures each case that comes, until None does: (seconds, mebibytes)."""
    function = trl() if name == "TRL" else {OURS: ours, "naive": naive}[name]
    while (case := pipe.recv()) is not None:
        pipe.send(measure(function, case, on))


def measure(function: Function, case: Case, on: str) -> tuple[float, float]:
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    n, v, h = case.tokens, case.vocabulary, case.hidden
    hidden = torch.randn(n, h, device=on, dtype=dtype).requires_grad_()
    weight = (torch.randn(v, h, device=on, dtype=dtype) / 24).requires_grad_()
    targets = torch.randint(v, (n,), device=on)
    tau = torch.linspace(0.1, 1.2, n, device=on) if case.everything else None
    before = _memory(on, peak=False)
    started = time.perf_counter()
    torch.stack([r.sum() for r in function(hidden, weight, targets, tau)]).sum().backward()
    if on == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return seconds, (_memory(on, peak=True) - before) / 2**20


def _memory(on: str, *, peak: bool) -> int:
    """Bytes in use now, from when a peak begins anew; or at the peak since then."""
    if on == "cuda":
        if not peak:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    if not peak:
        Path("/proc/self/clear_refs").write_text("5")
    field = "VmHWM" if peak else "VmRSS"
    status = Path("/proc/self/status").read_text()
    kibibytes = re.findall(rf"{field}:\s+(\d+) kB", status)
    return int(kibibytes[0]) * 1024


# --- the comparison ------------------------------------------------------------------------------


class Measured(NamedTuple):
    """Of one contender."""

    seconds: list[float]
    mebibytes: float


def compare(case: Case, rounds: int, on: str, console: Console) -> dict[str, Measured]:
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        pipes = {}
        for name in case.contenders:
            pipes[name], theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, name, on), daemon=True)
            process.start()
            theirs.close()
            stack.callback(process.join)
            stack.callback(pipes[name].send, None)
        results: dict[str, list[tuple[float, float]]] = {name: [] for name in pipes}
        for round_ in track(range(rounds + 1), str(case), console=console):
            for name in random.Random(round_).sample([*pipes], len(pipes)):
                pipes[name].send(case)
                results[name].append(pipes[name].recv())
    return {
        name: Measured([seconds for seconds, _ in found[1:]], found[0][1])
        for name, found in results.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[49_152, 151_936])
    parser.add_argument("--hidden", type=int, nargs="+", default=[576], help="576: SmolLM2-135M")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    console = Console(stderr=True)
    on = "cuda" if torch.cuda.is_available() else "cpu"
    cases = [
        Case(everything, options.tokens, vocabulary, hidden, options.dtype)
        for hidden in options.hidden
        for vocabulary in options.vocabulary
        for everything in (False, True)
        # all three the naive way need twice the memory: 20 GB at the larger vocabulary
        if not everything or vocabulary == min(options.vocabulary)
    ]
    results = {str(case): compare(case, options.rounds, on, console) for case in cases}
    report(results, as_json=options.json)


def report(results: dict[str, dict[str, Measured]], *, as_json: bool) -> None:
    ratios: dict[str, list[float]] = {}  # ours by theirs
    for case, found in results.items():
        mine = found[OURS]
        for name, theirs in found.items():
            if name != OURS:
                pairs = zip(mine.seconds, theirs.seconds, strict=True)
                ratios[f"{case}: time by {name}"] = [a / b for a, b in pairs]
                ratios[f"{case}: memory by {name}"] = [mine.mebibytes / theirs.mebibytes]
    if as_json:
        medians = {name: statistics.median(values) for name, values in ratios.items()}
        values = {
            case: {name: one._asdict() for name, one in found.items()}
            for case, found in results.items()
        }
        print(json.dumps({"ratios": medians, "values": values}))
        return
    for case, found in results.items():
        table = Table(
            "", "s median", "min", "max", "MiB", "ours: time", "min", "max", "memory", title=case
        )
        for name, one in found.items():
            cells = [f"{f(one.seconds):.2f}" for f in (statistics.median, min, max)]
            cells.append(f"{one.mebibytes:,.0f}")
            if name != OURS:
                spread = ratios[f"{case}: time by {name}"]
                cells += [f"{f(spread):.3f}" for f in (statistics.median, min, max)]
                cells.append(f"{ratios[f'{case}: memory by {name}'][0]:.3f}")
            table.add_row(name, *cells)
        Console().print(table)


if __name__ == "__main__":
    main()
