"""One sampling step: plain SGLang, ours, and the logit processor that users have had until now.

SGLang's own Sampler runs in this process on random logits, as it does in a server, with and without
the hooks. The modes are timed in turn, in an order that changes from round to round, and compared
within a round, so that a machine that slows down slows all of them.

    plain                SGLang's sampler, no hook
    ours, nothing asked  hooked, no request annealed
    ours, annealed       every row at its schedule's temperature (`rollout: false`)
    ours, recorded       and behaviour and model log-probabilities recorded
    ours, entropies      and entropies
    logit processor      EAD as a custom_logit_processor, row by row

With --lag, a plain server shows by how many tokens a logit processor's clock is wrong while
scheduling overlaps (SGLang issue 8056), and ours that its own is not.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ead_sampler import device, parse_annealing
from ead_sampler.in_scheduler import bad_numbers
from ead_sampler.in_scheduler.rows import AnnealedRows, RowRequest
from ead_sampler.selftest import sampling_info, standalone_sampler

PLAIN = "plain"
PROCESSOR = "logit processor"
ROWS: dict[str, dict[str, Any] | None] = {
    "ours, nothing asked": None,
    "ours, annealed": {"arrays": False},
    "ours, recorded": {},
    "ours, entropies": {"entropies": True},
}
PROMPT = 100  # tokens


def ead_row_by_row(logits: torch.Tensor, custom_param_list: list[dict[str, Any]]) -> torch.Tensor:
    """The paper's schedule as its public code applies it: a loop over the batch."""
    for index, params in enumerate(custom_param_list):
        t = len(params["__req__"].output_ids)
        tau = 1.0 if t < 10 else max(1 + 1.2 - math.exp(min(t / 500, 700)), 0.1)
        logits[index] /= tau
    return logits


def _with_repairs(sampler: Any, *arguments: Any) -> Any:
    """Sampler._sample_from_probs, hooked."""
    bad_numbers.mend_probabilities(sampler, *arguments)
    return type(sampler)._sample_from_probs(sampler, *arguments)


class Steps:
    """Every mode's sampling step on the same logits, for one batch size."""

    def __init__(self, sampler: Any, batch: int, vocabulary: int, on: str) -> None:
        self.sampler = sampler
        self.logits = torch.randn(batch, vocabulary, device=on) * 3
        self.scratch = torch.empty_like(self.logits)
        self.batch, self.on = batch, on
        self.positions = torch.arange(batch, device=on) % 400 + PROMPT
        schedule = parse_annealing({"step": 0})
        self.rows = {
            mode: None
            if fields is None
            else AnnealedRows.build([RowRequest(PROMPT, schedule, **fields)] * batch, on)
            for mode, fields in ROWS.items()
        }

    def seconds(self, mode: str, repeats: int) -> float:
        step = self._step(mode)
        total = 0.0
        for _ in range(repeats):
            self.scratch.copy_(self.logits)  # the sampler overwrites them
            self._wait()
            started = time.perf_counter()
            step()
            self._wait()
            total += time.perf_counter() - started
        return total / repeats

    def _wait(self) -> None:
        if self.on == "cuda":
            torch.cuda.synchronize()

    def _step(self, mode: str) -> Callable[[], Any]:
        from sglang.srt.layers.sampler import Sampler

        from ead_sampler.in_scheduler import sampling

        info = sampling_info(*self.logits.shape, self.on)
        output = SimpleNamespace(next_token_logits=self.scratch, auxiliary_device_output=None)
        arguments = (output, info, False, [0] * self.batch, [None] * self.batch, self.positions)
        if mode == PROCESSOR:
            self._add_processor(info)
        if mode in (PLAIN, PROCESSOR):
            return lambda: Sampler.forward(self.sampler, *arguments)
        setattr(info, sampling.ROWS, self.rows[mode])

        def forward(sampler: Any, *arguments: Any) -> Any:
            sampler._sample_from_probs = partial(_with_repairs, sampler)
            try:
                return Sampler.forward(sampler, *arguments)
            finally:
                del sampler._sample_from_probs

        def hooked() -> Any:
            output.auxiliary_device_output = None
            sampling.keep_model_logprobs(None, output, info)
            return sampling.sample(forward, self.sampler, *arguments)

        return hooked

    def _add_processor(self, info: Any) -> None:
        from sglang.srt.sampling.sampling_batch_info import ProcessorEntry

        info.has_custom_logit_processor = True
        info.custom_params = [
            {"__req__": SimpleNamespace(output_ids=range(int(p) + 1 - PROMPT))}
            for p in self.positions.tolist()
        ]
        rows = list(range(self.batch))
        indices = torch.arange(self.batch, device=self.on)
        info.custom_logit_processor = {0: ProcessorEntry(ead_row_by_row, rows, indices)}


def measure(options: argparse.Namespace, on: str, console: Console) -> dict[int, dict[str, Any]]:
    """Seconds per step of each mode and round, by batch size."""
    sampler = standalone_sampler(on)
    modes = [PLAIN, *ROWS, PROCESSOR]
    results: dict[int, dict[str, Any]] = {}
    with Progress(console=console) as progress:
        task = progress.add_task("rounds", total=len(options.batch) * options.rounds)
        for batch in options.batch:
            steps = Steps(sampler, batch, options.vocabulary, on)
            repeats = max(1, 128 // batch)
            seconds: dict[str, list[float]] = {mode: [] for mode in modes}
            for mode in modes:
                steps.seconds(mode, 1)  # warms up
            for round_ in range(options.rounds):
                order = random.Random(round_).sample(modes, len(modes))
                for mode in order:
                    seconds[mode].append(steps.seconds(mode, repeats))
                progress.advance(task)
            results[batch] = seconds
    return results


# --- the lag of a logit processor's clock ------------------------------------------------------


def lag(console: Console) -> dict[str, Any]:
    """t as a logit processor sees it on a plain server, and as ours records it."""
    import sys

    import httpx
    from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

    from ead_server.launch import models
    from ead_server.launch.process import ServerProcess
    from ead_server.launch.serve import with_defaults

    class TellsItsClock(CustomLogitProcessor):
        """Forces the token whose id is the t that it sees."""

        def __call__(self, logits: Any, custom_param_list: Any = None) -> Any:
            for index, params in enumerate(custom_param_list):
                t = len(params["__req__"].output_ids)
                kept = logits[index, t].clone()
                logits[index] = float("-inf")
                logits[index, t] = kept
            return logits

    count = 40
    arguments = with_defaults(["--model-path", models.resolve("smollm2")], cpu=device.is_cpu())
    arguments += ["--enable-custom-logit-processor"]
    params: dict[str, Any] = {"max_new_tokens": count, "ignore_eos": True, "temperature": 1.0}
    with tempfile.TemporaryDirectory() as folder:
        for name, command, environ in (
            ("plain", (sys.executable, "-m", "sglang.launch_server"), {"SGLANG_PLUGINS": "none"}),
            ("ours", (sys.executable, "-m", "ead_cli.main", "serve"), {}),
        ):
            log = Path(folder) / f"{name}.log"
            with ServerProcess(arguments, log, command=command, environ=environ) as server:
                with console.status(f"starting the {name} server"):
                    server.wait_until_ready()
                body: dict[str, Any] = {"text": "The sea", "sampling_params": params}
                if name == "plain":
                    body["custom_logit_processor"] = TellsItsClock.to_str()
                    body["sampling_params"] = {**params, "custom_params": {}}
                else:
                    body["sampling_params"] = {**params, "annealing": {"preset": "paper"}}
                answer = httpx.post(f"{server.url}/generate", json=body, timeout=300)
                answer.raise_for_status()
                if name == "plain":
                    seen = answer.json()["output_ids"]
                else:
                    recorded = answer.json()["meta_info"]["temperatures"]
    paper = parse_annealing({"preset": "paper", "step": 0}).temperatures
    right = paper(torch.arange(count))
    return {
        "largest lag of the processor, tokens": max(t - s for t, s in enumerate(seen)),
        "its largest temperature error": (paper(torch.tensor(seen)) - right).abs().max().item(),
        "our largest temperature error": (torch.tensor(recorded) - right).abs().max().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--lag", action="store_true", help="also start the two servers")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    console = Console(stderr=True)
    device.choose()
    on = "cpu" if device.is_cpu() else "cuda"
    with torch.no_grad():  # as SGLang runs its sampler
        results = measure(options, on, console)
    ratios = {
        f"{mode}, batch {batch}": [
            s / p for s, p in zip(seconds[mode], seconds[PLAIN], strict=True)
        ]
        for batch, seconds in results.items()
        for mode in seconds
        if mode != PLAIN
    }
    clock = lag(console) if options.lag else None
    if options.json:
        medians = {name: statistics.median(values) for name, values in ratios.items()}
        print(json.dumps({"ratios": medians, "seconds": results, "lag": clock}))
        return
    threads = f", {torch.get_num_threads()} threads" if on == "cpu" else ""
    title = f"vocabulary {options.vocabulary:,}, {options.rounds} rounds, {on}{threads}"
    table = Table("batch", "mode", "ms median", "ratio median", "min", "max", title=title)
    for batch, seconds in results.items():
        for mode, values in seconds.items():
            spread = ratios.get(f"{mode}, batch {batch}")
            cells = [f"{f(spread):.3f}" for f in (statistics.median, min, max)] if spread else []
            table.add_row(str(batch), mode, f"{statistics.median(values) * 1e3:.3f}", *cells)
        table.add_section()
    Console().print(table)
    for name, value in (clock or {}).items():
        print(f"{name}: {value:.3g}")


if __name__ == "__main__":
    main()
