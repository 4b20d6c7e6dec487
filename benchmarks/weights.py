"""What a sync of the weights costs: seconds by phase and bytes, each way.

    tensors      safetensors over HTTP
    adapters     the same, of LoRA's factors alone, which the server merges
    distributed  broadcasts (gloo here, without a GPU)
    disk         a folder

SmolLM2-135M, trainer and server on one machine, the trainer's weights in float32. Nothing is
generated during "pause" and "load", together the standstill; "total" is what the trainer waits.
The ways take turns, round after round, in an order that changes; the first round, in which the
process group is made, is told apart as "first".
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import track
from rich.table import Table

from ead_client import Client
from ead_sampler import device
from ead_server.launch import models
from ead_server.launch.process import ServerProcess
from trainer_bridge.policy.policy import LoraConfig, ModelConfig, load_policy
from trainer_bridge.sync.publisher import SyncConfig, SyncReport, weight_publisher

WAYS = ("tensors", "adapters", "distributed", "disk")
DTYPES = ("bfloat16", "float32")
PHASES = ("write", "join", "transfer", "merge", "pause", "load", "standstill", "total")


class Sync(NamedTuple):
    """One sync."""

    dtype: str  # that the server serves
    way: str
    first: bool
    num_bytes: int
    seconds: Mapping[str, float]


def measure(dtype: str, options: argparse.Namespace, console: Console) -> Iterator[Sync]:
    path = str(models.pull())
    policy, _ = load_policy(ModelConfig(path=path))
    adapted, _ = load_policy(ModelConfig(path=path, lora=LoraConfig(rank=options.rank)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = ["--dtype", dtype, "--weights-root", name]
        with ServerProcess(arguments, folder / "server.log") as server:
            with console.status(f"starting a server of {dtype}"):
                server.wait_until_ready()
            with Client(server.url, admin_api_key=server.admin_api_key) as client:
                publishers = {}
                for way in WAYS:
                    fields = {"folder": folder, "bucket_bytes": options.bucket_bytes}
                    fields["transport"] = "tensors" if way == "adapters" else way
                    config = SyncConfig.model_validate(fields)
                    publishers[way] = weight_publisher(client, config)
                for round_ in track(range(options.rounds + 1), dtype, console=console):
                    for way in random.Random(round_).sample(WAYS, len(WAYS)):
                        version = f"{way}-{round_}"
                        publish = publishers[way].publish
                        if way == "adapters":
                            named, scale = adapted.named_adapters(), adapted.lora_scale
                            report = publish(named, version, lora_scale=scale)
                        else:
                            report = publish(policy.named_weights(), version)
                        if client.model_info()["weight_version"] != version:
                            raise SystemExit(f"{version} is not served")
                        yield Sync(dtype, way, round_ == 0, report.num_bytes, phases(report))


def phases(report: SyncReport) -> dict[str, float]:
    seconds = dict(report.seconds)
    return {**seconds, "standstill": seconds["pause"] + seconds["load"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--bucket-bytes", type=int, default=128 << 20)
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    device.choose()
    console = Console(stderr=True)
    syncs = [sync for dtype in DTYPES for sync in measure(dtype, options, console)]
    report(syncs, as_json=options.json)


def report(syncs: list[Sync], *, as_json: bool) -> None:
    if as_json:
        ratios = {f"{d}, {w}": ratio(syncs, d, w) for d in DTYPES for w in WAYS if w != "tensors"}
        print(json.dumps({"ratios": ratios, "syncs": [sync._asdict() for sync in syncs]}))
        return
    table = Table("served", "way", "MB", *PHASES, "first", title="seconds, medians (min to max)")
    for dtype in DTYPES:
        for way in WAYS:
            found = [sync for sync in syncs if (sync.dtype, sync.way) == (dtype, way)]
            later = [sync.seconds for sync in found if not sync.first]
            (first,) = (sync.seconds["total"] for sync in found if sync.first)
            by_phase = {phase: [s[phase] for s in later if phase in s] for phase in PHASES}
            cells = [f"{statistics.median(v):.2f}" if v else "" for v in by_phase.values()]
            cells[-2:] = [spread(by_phase[phase]) for phase in PHASES[-2:]]
            table.add_row(dtype, way, f"{found[0].num_bytes / 1e6:.0f}", *cells, f"{first:.2f}")
    Console().print(table)


def ratio(syncs: list[Sync], dtype: str, way: str) -> float:
    """Median over the rounds of this way's seconds to those of `tensors`."""
    totals = {
        each: [s.seconds["total"] for s in syncs if (s.dtype, s.way) == (dtype, each)][1:]
        for each in (way, "tensors")
    }
    pairs = zip(totals[way], totals["tensors"], strict=True)
    return statistics.median(ours / theirs for ours, theirs in pairs)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
