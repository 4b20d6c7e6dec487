"""A training run that is killed again and again, against the same run left alone.

Both train adapters with a KL penalty on a tiny model, with answers generated ahead, evaluations and
TensorBoard, on one process or on several ranks with sharded weights. The second is killed at random
moments: the trainer (one of its ranks), which is started again with --resume, or the server's
scheduler, with which the server ends, and is started again on its port. Then the two must agree in
the weights, in every metric of every step and in the evaluations, and no step may be missing or
written twice.

What two runs that nobody disturbs differ by is told beside it: in a batch of other requests the
server's sums round differently, Adam makes more of it, and at high learning rates some token
becomes another one sooner or later. Exit status 1 when weights differ by more than --limit, or
anything else does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import runpy
import secrets
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

from ead_sampler import device
from ead_server.launch.process import ServerProcess
from trainer_bridge.run.report import read_metrics

TESTS = Path(__file__).parent.parent / "tests"
FLAGS = ("--dtype", "float32", "--max-total-tokens", "65536", "--random-seed", "7")
SETTINGS = (
    "task.kind=helpers.toys:Letters",
    "model.lora={rank=4}",
    "loss.kl_coefficient=0.05",
    "correction.kind=tis",
    "rollout.staleness=1",
    "rollout.seeded=true",
    "rollout.prompts_per_step=3",
    "rollout.samples_per_prompt=4",
    "rollout.max_new_tokens=24",
    "rollout.annealing={tau_max=1.5, tau_min=0.3, decay=20.0, warmup=3}",
    "optimizer.learning_rate=1e-4",  # a step lost or done twice shows as ten times the limit
    "update.tokens_per_forward=400",
    "reward.workers=1",
    "evaluate_every=5",
    "evaluation={problems=4, n=2, max_new_tokens=16}",
    "report.tensorboard=true",
)
CLOSE = {"rel": 5e-3, "abs": 1e-4}  # of metrics: float32, in batches of other sizes


class Kill(NamedTuple):
    """One moment at which something is killed."""

    after: int  # steps that are written
    delay: float  # further seconds
    what: Literal["trainer", "server"]


@dataclass
class Found:
    """How two runs differ."""

    weights: float  # largest difference
    missing: list[int] = field(default_factory=list)  # steps
    twice: list[int] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    tensorboard: list[str] = field(default_factory=list)

    def right(self, limit: float) -> bool:
        return self.weights <= limit and not (
            self.missing or self.twice or self.metrics or self.tensorboard
        )


class Restarted:
    """A server that is started again after each kill. (`--restart` gives up one that ends three
    times within a minute.)"""

    def __init__(self, model: Path, folder: Path) -> None:
        self.arguments = ["--model-path", str(model), *FLAGS]
        self.log = folder / "server.log"
        self.key = secrets.token_urlsafe(32)
        self.process = self._start(0)

    def _start(self, port: int) -> ServerProcess:
        environ = {"EAD_ADMIN_API_KEY": self.key}
        return ServerProcess(self.arguments, self.log, port=port, environ=environ)

    def kill(self) -> None:
        """Its scheduler, or all of it when it is not that far yet."""
        family = psutil.Process(self.process.process.pid).children(recursive=True)
        for one in [one for one in family if "scheduler" in one.name()]:
            one.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.process.wait(15 if family else 0)
        self.process.stop(0.0)
        self.process = self._start(self.process.port)


def kills_at_random(count: int, steps: int, seconds: float, seed: int) -> list[Kill]:
    """Moments all over a run whose steps last so long; the trainer's and the server's in turn."""
    drawn = random.Random(seed)
    moments = sorted((drawn.randrange(steps - 1), drawn.uniform(0, seconds)) for _ in range(count))
    first = drawn.randrange(2)
    return [
        Kill(after, delay, ("trainer", "server")[(first + number) % 2])  # type: ignore[arg-type]
        for number, (after, delay) in enumerate(moments)
    ]


def run(
    folder: Path,
    arguments: Sequence[str],
    server: Restarted,
    ranks: int,
    kills: Sequence[Kill],
    say: Console,
) -> float:
    """Train to the end, whatever is killed on the way; the seconds that it took."""
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environ = {
        **os.environ,
        "EAD_ADMIN_API_KEY": server.key,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path,
    }
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "ead_cli.main", "train", "--folder", str(folder), *arguments]
    command += [f"server.url={server.process.url}"]
    left, started = list(kills), time.monotonic()
    with folder.with_suffix(".log").open("ab") as log:
        trainer = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
        while True:
            if left:
                wait_for_step(folder, left[0].after, trainer)
                time.sleep(left[0].delay)  # the moment is what is tried, not a condition
            if not left or trainer.poll() is not None:
                if trainer.wait() != 0:
                    raise SystemExit(f"the run failed:\n{folder.with_suffix('.log').read_text()}")
                if left:
                    say.print(f"the run had ended before {left}")
                return time.monotonic() - started
            kill = left.pop(0)
            say.print(f"{len(read_metrics(folder))} steps are written: the {kill.what} is killed")
            if kill.what == "server":
                server.kill()
                continue
            kill_trainer(trainer, ranks)
            resumed = [*command, "--resume"]
            trainer = subprocess.Popen(resumed, env=environ, stdout=log, stderr=log)


def wait_for_step(folder: Path, count: int, trainer: subprocess.Popen[bytes]) -> None:
    """Return when so many steps are written, or the trainer has ended."""
    while len(read_metrics(folder)) < count and trainer.poll() is None:
        time.sleep(0.02)


def kill_trainer(trainer: subprocess.Popen[bytes], ranks: int) -> None:
    """One of its ranks, after which torchrun ends the others."""
    family = psutil.Process(trainer.pid).children(recursive=True)
    workers = [one for one in family if "train" in one.cmdline()] if ranks > 1 else []
    (workers[0] if workers else psutil.Process(trainer.pid)).kill()
    trainer.wait(120)
    for process in family:  # ranks whose torchrun had not begun to watch them
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=60)


def differences(got: Path, want: Path, steps: int) -> Found:
    ours, theirs = (load_file(next((run / "model").glob("*.safetensors"))) for run in (got, want))
    largest = float(  # NaN where there is one
        np.max([np.abs(w.astype(np.float64) - ours[name]).max() for name, w in theirs.items()])
    )
    entries = read_metrics(got)
    written = Counter(entry["step"] for entry in entries)
    found = Found(
        largest,
        missing=[step for step in range(steps) if not written[step]],
        twice=[step for step, times in written.items() if times > 1],
    )
    for entry, other in zip(entries, read_metrics(want), strict=False):
        found.metrics += different(entry, other, f"step {entry['step']}: ")
    found.tensorboard = board_differences(got, entries)
    return found


def different(entry: dict[str, Any], other: dict[str, Any], where: str) -> list[str]:
    """The names of metrics that are not equal, but for those of the clock and the connection."""
    names = [n for n in sorted(entry | other) if not n.startswith(("time/", "sync/"))]
    return [
        f"{where}{name} {entry.get(name)} for {other.get(name)}"
        for name in names
        if not close(entry.get(name), other.get(name))
    ]


def close(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return abs(one - other) <= max(CLOSE["abs"], CLOSE["rel"] * abs(other))


def board_differences(run: Path, entries: Sequence[dict[str, Any]]) -> list[str]:
    """Where TensorBoard shows another value than metrics.jsonl, or a step twice or not at all."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    wrong = []
    for name in sorted({name for entry in entries for name in entry} - {"step"}):
        want = {entry["step"]: entry[name] for entry in entries if name in entry}
        shown = [(event.step, event.value) for event in board.Scalars(name)]
        same = len(shown) == len(want) and all(
            step in want and np.float32(want[step]) == np.float32(value) for step, value in shown
        )
        if not same:
            wrong.append(f"{name}: {shown}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=3, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--limit", type=float, default=1e-5, help="of weights")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    console = Console(stderr=True)
    device.choose()
    result: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        make_tiny_model = runpy.run_path(str(TESTS / "helpers" / "tiny.py"))["make_tiny_model"]
        model = make_tiny_model(place / "model")
        arguments = [f"model.path={model}", f"steps={options.steps}", *SETTINGS]
        arguments += [f"checkpoint.every={options.every}"]
        server = Restarted(model, place)
        try:
            server.process.wait_until_ready()
            for ranks in options.ranks:
                alone, again, killed = (place / f"{kind}-{ranks}" for kind in "abc")
                run(alone, arguments, server, ranks, [], console)
                run(again, arguments, server, ranks, [], console)
                seconds = [entry["time/step"] for entry in read_metrics(again)]
                kills = kills_at_random(
                    options.kills, options.steps, float(np.mean(seconds)), options.seed
                )
                took = run(killed, arguments, server, ranks, kills, console)
                result[f"{ranks} ranks" if ranks > 1 else "1 process"] = {
                    "killed": asdict(differences(killed, alone, options.steps)),
                    "undisturbed": asdict(differences(again, alone, options.steps)),
                    "kills": [kill._asdict() for kill in kills],
                    "seconds": took,
                }
        finally:
            server.process.stop(0.0)
    right = all(Found(**one["killed"]).right(options.limit) for one in result.values())
    if options.json:
        print(json.dumps({"ratios": {}, "right": right, "runs": result}))
    else:
        table = Table("", "weights differ by", "undisturbed", "missing", "twice", "other", "s")
        for kind, one in result.items():
            killed = one["killed"]
            other = [*killed["metrics"], *killed["tensorboard"]]
            cells = [f"{one[run]['weights']:.1e}" for run in ("killed", "undisturbed")]
            cells += [str(killed[name]) for name in ("missing", "twice")]
            table.add_row(kind, *cells, "\n".join(other[:5]), f"{one['seconds']:.0f}")
        Console().print(table)
    sys.exit(not right)


if __name__ == "__main__":
    main()
