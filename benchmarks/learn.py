"""Does it learn? GRPO with EAD's rollouts and with rollouts at temperature 1, several seeds each.

Every run trains the same model from the same weights on the same task. Before the first and after
each run the server answers the same held-out problems at temperature 1. Tested is whether the mean
reward rose over all runs of a kind: one-sided paired t-test over the held-out problems, a
problem's gain being the mean over seeds. Table, figure and runs are left in the folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy import stats

from ead_cli.train import RemoteServer, server_for
from ead_server.launch import models
from trainer_bridge.run.config import TrainConfig, read_config
from trainer_bridge.run.evaluate import Evaluation, evaluate
from trainer_bridge.run.loop import train
from trainer_bridge.run.report import Display, read_metrics
from trainer_bridge.tasks.reward_runner import RewardRunner

EXAMPLE = Path(__file__).parent.parent / "examples" / "products.toml"
KINDS = {"EAD": (), "temperature 1": ("rollout.annealing={schedule='constant'}",)}


def held_out(server: RemoteServer, config: TrainConfig) -> Evaluation:
    task = config.task.build()
    with RewardRunner(task.reward, config.reward) as rewards:
        return evaluate(server.client, task, rewards, config.evaluation)


def by_problem(evaluation: Evaluation) -> NDArray[np.float64]:
    """Mean reward of each problem; failed answers count in none."""
    rewards = np.array(evaluation.rewards, dtype=np.float64)
    means: NDArray[np.float64] = np.nanmean(rewards, axis=1)
    return means


def draw(curves: dict[str, list[list[float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    for colour, (kind, runs) in zip(("tab:red", "tab:blue"), curves.items(), strict=True):
        for rewards in runs:
            axis.plot(rewards, color=colour, alpha=0.25, linewidth=1)
        axis.plot(np.mean(runs, axis=0), color=colour, linewidth=2, label=f"{kind}: mean of seeds")
    axis.set(xlabel="step", ylabel="reward of the rollouts", title="GRPO, reward by step")
    axis.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", nargs="*", default=[str(EXAMPLE)], help="as of `ead train`")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("runs/learn"))
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    console = Console(stderr=True)
    options.folder.mkdir(parents=True, exist_ok=True)
    first = read_config(options.settings)
    model = models.resolve(first.model.path)
    curves: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
    after: dict[str, list[NDArray[np.float64]]] = {kind: [] for kind in KINDS}
    with server_for(first.server, model, options.folder, console.print) as server:
        before = by_problem(held_out(server, first))
        console.print(f"held-out reward before: {before.mean():.3f}")
        for seed in range(options.seeds):
            for kind, settings in KINDS.items():
                run = options.folder / f"{kind.replace(' ', '-')}-{seed}"
                arguments = [*options.settings, *settings, f"model.path={model}", f"seed={seed}"]
                config = read_config(arguments)
                console.print(f"[bold]{kind}, seed {seed}")
                with Display(console, config.steps) as display:
                    train(config, run, server, display)
                curves[kind].append([entry["reward/mean"] for entry in read_metrics(run)])
                after[kind].append(by_problem(held_out(server, config)))
                console.print(f"held-out reward after: {after[kind][-1].mean():.3f}")
    draw(curves, options.folder / "learn.png")
    found: dict[str, Any] = {}
    for kind, runs in after.items():
        gains = np.mean(runs, axis=0) - before
        test = stats.ttest_1samp(gains, 0.0, alternative="greater")
        found[kind] = {
            "before": float(before.mean()),
            "after": [float(run.mean()) for run in runs],
            "gain": float(gains.mean()),
            "interval": [float(x) for x in stats.ttest_1samp(gains, 0.0).confidence_interval()],
            "p_value": float(test.pvalue),
        }
    (options.folder / "learn.json").write_text(json.dumps(found, indent=1))
    if options.json:
        ratios = {kind: np.mean(f["after"]) / f["before"] for kind, f in found.items()}
        print(json.dumps({"ratios": ratios, **found}))
        return
    title = f"{first.steps} steps, {options.seeds} seeds, {len(before)} held-out problems"
    table = Table("rollouts", "before", "after", "gain (95 %)", "p", title=title)
    for kind, f in found.items():
        low, high = f["interval"]
        afters = ", ".join(f"{value:.3f}" for value in f["after"])
        gain = f"{f['gain']:+.3f} ({low:+.3f} to {high:+.3f})"
        table.add_row(kind, f"{f['before']:.3f}", afters, gain, f"{f['p_value']:.1e}")
    Console().print(table)
    Console().print(f"figure: {options.folder / 'learn.png'}", highlight=False)


if __name__ == "__main__":
    main()
