"""`ead demo`: the whole path on one machine, in the open. Stops what it starts.

Serve the embedded model, ask it one annealed question through the official OpenAI client, train a
few GRPO steps against the same server, and draw what happened.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ead_cli.chat import COLUMNS, heat
from ead_sampler import device
from ead_sampler.defaults import DEFAULT_ANNEALING
from ead_server.launch import models
from ead_server.launch.process import HOST, ServerProcess, flags_beside_a_trainer, hold_port

QUESTION = "Tell me one surprising fact about the sea, in one sentence."
# The paper's numbers are sized for long mathematics; these anneal within forty tokens.
CHAT_SCHEDULE = {"tau_max": 1.2, "tau_min": 0.1, "decay": 50.0, "warmup": 4, "step": 0}
TRAIN_SCHEDULE = {"tau_max": 1.2, "tau_min": 0.3, "decay": 16.0, "decay_growth": 1.0, "warmup": 1}
CHAT_TOKENS = 48
CHAT_SAMPLES = 8


def run(*, steps: int, out: Path, port: int) -> None:
    """Everything, in order. Files go to `out`, or, where that holds something, to a new folder
    beside it. Raises what fails, after stopping the server."""
    console = Console()
    started = time.perf_counter()
    out = _new_folder(out)
    hold_port(HOST, port).close()  # a taken one is found before a model is fetched

    console.rule("[bold]1  Model and server")
    console.print(f"device: {device.choose()}")
    model = models.pull()
    flags = flags_beside_a_trainer(on_cpu=device.is_cpu())
    arguments = [*flags, "--weights-root", str(out)]
    environ = {DEFAULT_ANNEALING: ""}  # the demo says itself what it samples with
    with ServerProcess(arguments, out / "server.log", port=port, environ=environ) as server:
        with _waiting(console, "starting SGLang") as say:
            server.wait_until_ready(progress=say)
        log = escape(str(server.log))
        console.print(f"serving SmolLM2-135M-Instruct at {server.url}, log in {log}")

        console.rule("[bold]2  One annealed question, through the official openai client")
        choices = _ask(console, server)

        console.rule(f"[bold]3  {steps} GRPO steps against the same server")
        _train(console, server, model, steps, out)
        with _waiting(console, "stopping the server"):
            server.stop()

    picture, trained = out / "annealing.png", escape(str(out / "train"))
    _draw([choice.rollout for choice in choices], picture)
    console.rule("[bold]Done")
    console.print(
        f"{time.perf_counter() - started:.0f} s in all; the server is stopped.\n"
        f"Picture: [bold]{escape(str(picture))}[/] "
        "(schedule, temperatures used, entropy by position)\n"
        f"Run: [bold]{trained}[/] (settings, metrics, answers, curves, the trained model)\n"
        "Next:\n"
        "  .venv/bin/ead serve                      # the same server, for your own requests\n"
        "  curl http://127.0.0.1:30000/v1/chat/completions -H 'content-type: application/json' \\\n"
        '    -d \'{"model": "smollm2", "messages": [{"role": "user", "content": "Hello"}],\n'
        '         "annealing": {"preset": "paper"}}\'\n'
        "  .venv/bin/ead serve --model-path MODEL   # any other model; all SGLang flags pass\n"
        "  .venv/bin/ead train examples/products.toml",
        soft_wrap=True,
    )


def _new_folder(asked: Path) -> Path:
    """This folder if it is new or empty, else the first free one with a number: nothing that is
    there is written over."""
    for number in itertools.count(1):
        folder = asked if number == 1 else asked.with_name(f"{asked.name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
        if folder.is_dir() and not any(folder.iterdir()):
            return folder
    raise AssertionError("numbers do not end")


def _ask(console: Console, server: ServerProcess) -> list[Any]:
    """One chat request with several samples; shows the first."""
    import openai

    with _waiting(console, f"{CHAT_SAMPLES} samples of up to {CHAT_TOKENS} tokens"):
        client = openai.OpenAI(
            base_url=f"{server.url}/v1",
            api_key=server.api_key or "none",
            timeout=600,
            http_client=openai.DefaultHttpxClient(trust_env=False),  # past any proxy
        )
        answer = client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": QUESTION}],
            max_tokens=CHAT_TOKENS,
            n=CHAT_SAMPLES,
            logprobs=True,
            extra_body={"annealing": CHAT_SCHEDULE, "rollout": {"entropies": True}},
        )
    entries: Any = answer.choices[0].logprobs and answer.choices[0].logprobs.content
    console.print(f"[bold]{QUESTION}[/]")
    text = Text()
    for entry in entries:
        text.append(entry.token, style=_colour(entry.temperature))
    console.print(text, Text("   hot ", style=_colour(1.2)) + Text("to cool", style=_colour(0.1)))
    table = Table("t", "token", "temperature", "logprob", "model logprob", title_justify="left")
    shown = [*range(min(8, len(entries))), *range(max(8, len(entries) - 6), len(entries))]
    for t in shown:
        entry = entries[t]
        table.add_row(
            str(t),
            Text(repr(entry.token), style=_colour(entry.temperature)),
            f"{entry.temperature:.3f}",
            f"{entry.logprob:.3f}",
            f"{entry.model_logprob:.3f}",
            end_section=t == 7,
        )
    console.print(table)
    return list(answer.choices)


def _train(console: Console, server: ServerProcess, model: Path, steps: int, out: Path) -> None:
    """What `ead train` does, on a verifiable task; one line of figures per step."""
    from transformers.utils import logging

    from ead_cli.train import RemoteServer
    from ead_client import Client
    from trainer_bridge import TrainConfig
    from trainer_bridge.run.loop import train
    from trainer_bridge.run.report import Display

    logging.disable_progress_bar()  # ours is enough
    config = TrainConfig.model_validate(
        {
            "steps": steps,
            "model": {"path": str(model)},
            "rollout": {
                "prompts_per_step": 6,
                "samples_per_prompt": 6,
                "max_new_tokens": 16,
                "annealing": TRAIN_SCHEDULE,
            },
            "optimizer": {"learning_rate": 1e-5},
            "update": {"tokens_per_forward": 1024},
            "checkpoint": {"every": 0},
        }
    )
    console.print(
        f"{config.rollout.prompts_per_step} problems x {config.rollout.samples_per_prompt} answers "
        "a step; reward: exact verifier of reasoning-gym's products; trained: the policy at "
        f"{config.correction.trained_policy}, annealed answers\nweighted by w = min(pi_old / mu, "
        f"{config.correction.cap:g}) per token; AdamW {config.optimizer.learning_rate:g}; "
        "mismatch: server's log pi against the trainer's, nats",
        soft_wrap=True,
    )
    client = Client(server.url, api_key=server.api_key, admin_api_key=server.admin_api_key)
    with client, Display(console, config.steps) as display:
        train(config, out / "train", RemoteServer(client, 60.0), display)


def _draw(rollouts: Sequence[dict[str, Any]], path: Path) -> None:
    """The schedule with the temperatures used over it, and entropy by position."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    import torch

    from ead_sampler import parse_annealing

    length = max(len(rollout["temperatures"]) for rollout in rollouts)
    t = np.arange(length)
    schedule = parse_annealing(rollouts[0]["annealing"]).temperatures(torch.arange(length))
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    upper.plot(t, schedule, color="0.75", linewidth=6, label="schedule (closed form)")
    for index, rollout in enumerate(rollouts):
        used = rollout["temperatures"]
        label = "temperatures used by the sampler" if index == 0 else None
        upper.plot(t[: len(used)], used, ".", color="tab:red", markersize=4, label=label)
    upper.set(ylabel="temperature", title="Explore at the beginning, exploit at the end")
    upper.legend()
    for rollout in rollouts:
        entropies = rollout["entropies"]
        lower.plot(t[: len(entropies)], entropies, color="tab:blue", alpha=0.25, linewidth=1)
    padded = np.full((len(rollouts), length), np.nan)
    for row, rollout in zip(padded, rollouts, strict=True):
        row[: len(rollout["entropies"])] = rollout["entropies"]
    lower.plot(t, np.nanmean(padded, axis=0), color="tab:blue", linewidth=2, label="mean")
    lower.set(xlabel="position t (generated tokens)", ylabel="entropy of the model (nats)")
    lower.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _colour(temperature: float) -> str:
    return heat(temperature / COLUMNS["temperature"])


@contextmanager
def _waiting(console: Console, what: str) -> Iterator[Callable[[str], None]]:
    """A spinner with the seconds gone; on no terminal, one line at the end."""
    started = time.perf_counter()
    if not console.is_terminal:
        console.print(f"{what} ...")
        yield lambda detail: None
    else:
        with Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}", style="dim", markup=False),  # of a log
            console=console,
            transient=True,
        ) as progress:
            task = progress.add_task(what, detail="")
            yield lambda detail: progress.update(task, detail=detail[: console.width // 2])
    console.print(f"[green]ok[/] {what}, {time.perf_counter() - started:.1f} s", highlight=False)
