"""What a run leaves behind and shows while it goes on: one folder, one line or table per step.

config.json, versions.json   what was run
metrics.jsonl                one object per step; also TensorBoard's event files in tensorboard/
metrics.dropped.jsonl        those of steps that a resumed run has done again
samples/step-000012.jsonl    a few answers with their rewards and temperatures
checkpoints/                 see trainer_bridge.run.checkpoint
curves.png                   drawn at the end, and by `ead plot`
"""

from __future__ import annotations

import importlib
import json
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from trainer_bridge.errors import BadConfig
from trainer_bridge.run.growing_files import EventFile, GrowingFile, write_whole
from trainer_bridge.settings import Settings

_PACKAGES = ("ead", "sglang", "torch", "transformers", "peft", "reasoning-gym", "math-verify")
PHASES = ("rollout", "update", "publish", "checkpoint", "evaluate")
# shown while a run goes on: name, format, heading
_SHOWN = (
    ("reward/mean", "{:.3f}", "reward"),
    ("reward/best_of_group", "{:.2f}", "best"),
    ("policy/entropy", "{:.2f}", "entropy"),
    ("policy/temperature", "{:.2f}", "tau"),
    ("correction/effective_sample_size", "{:.2f}", "ESS"),
    ("optim/grad_norm", "{:.2f}", "grad"),
    ("policy/mismatch", "{:.0e}", "mismatch"),
    ("time/tokens_per_second", "{:.0f}", "tokens/s"),
    ("time/step", "{:.1f}", "s"),
)


class ReportConfig(Settings):
    """What is recorded besides metrics.jsonl."""

    samples: int = Field(4, ge=0, description="answers kept of every step")
    tensorboard: bool = True
    tracker: Literal["wandb", "trackio"] | None = Field(
        None, description="also sends the metrics there; must be installed"
    )


class RunFolder:
    """The folder of one run; a run that goes on continues the files of the first.

    What the disk refuses later is written when it takes it again, and the run goes on meanwhile.
    resumed_at: the step it goes on with; what was written of that step or later is dropped.
    say: told when the disk begins to refuse, and when all is written. Raises ImportError for a
    tracker that is not installed, OSError.
    """

    def __init__(
        self,
        path: Path,
        config: ReportConfig,
        described: Mapping[str, Any],
        resumed_at: int,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.path = path
        self.config = config
        (path / "samples").mkdir(parents=True, exist_ok=True)
        write_whole(path / "config.json", json.dumps(described, indent=1).encode())
        write_whole(path / "versions.json", json.dumps(_versions(), indent=1).encode())
        self._metrics = GrowingFile(path / "metrics.jsonl")
        _drop_from(self._metrics.path, resumed_at)
        self.told = {entry["step"] for entry in read_metrics(path)}
        self._board: EventFile | None = None
        if config.tensorboard:
            (path / "tensorboard").mkdir(exist_ok=True)
            self._board = EventFile(path / "tensorboard", purge_step=resumed_at)
        self._samples: dict[Path, bytes] = {}  # that are not written yet
        self._say = say
        self._refused = False  # when last tried
        self._tracker: Any = None
        if config.tracker is not None:
            self._tracker = importlib.import_module(config.tracker)
            self._tracker.init(project="ead", name=path.name, config=dict(described))

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one step's."""
        self._metrics.add(json.dumps({"step": step, **metrics}).encode() + b"\n")
        if self._board is not None:
            self._board.metrics(step, metrics)
        self._write()
        if self._tracker is not None:
            self._tracker.log(dict(metrics), step=step)

    def samples(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """Keep the first few answers of a step."""
        lines = [json.dumps(sample) + "\n" for sample in islice(samples, self.config.samples)]
        file = self.path / "samples" / f"step-{step:06d}.jsonl"
        self._samples[file] = "".join(lines).encode()
        self._write()

    def _write(self) -> None:
        try:
            self._metrics.write()
            if self._board is not None:
                self._board.write()
            for file in list(self._samples):
                write_whole(file, self._samples[file])
                del self._samples[file]
        except OSError as error:
            if not self._refused:
                self._say(f"cannot write ({error}): the run goes on, and writes it when it can")
            self._refused = True
        else:
            if self._refused:
                self._say(f"what could not be written to {self.path} is written")
            self._refused = False

    def close(self) -> None:
        self._write()
        if self._refused:
            self._say(f"{self.path} lacks what could not be written")
        if self._tracker is not None:
            self._tracker.finish()


def changes(path: Path, described: Mapping[str, Any]) -> list[str]:
    """Settings that are not those in the folder's config.json, as "optimizer.betas: A -> B"."""
    try:
        before = dict(_flat(json.loads((path / "config.json").read_bytes())))
    except (OSError, ValueError):
        return []
    now = dict(_flat(json.loads(json.dumps(described))))
    names = [name for name in (before | now) if before.get(name) != now.get(name)]
    return [f"{name}: {before.get(name)!r} -> {now.get(name)!r}" for name in names]


def _flat(section: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def check_folder(path: Path, *, resume: bool) -> None:
    """Raises BadConfig when a run in this folder would write over what another left: it may have
    ended before its first checkpoint."""
    left = [path / "metrics.jsonl", *(path / "samples").glob("*"), *(path / "model").glob("*")]
    if not resume and any(file.exists() and file.stat().st_size for file in left):
        raise BadConfig(f"{path} already holds a run: go on with --resume, or choose another")
    config = path / "config.json"
    if config.exists() and not {"steps", "rollout"} <= {*_object(config.read_bytes())}:
        raise BadConfig(f"{config} is not of a run: choose another folder")


def _object(text: bytes) -> dict[str, Any]:
    """The JSON object, or an empty one for what is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _drop_from(metrics: Path, step: int) -> None:
    """Move the entries of this step and later ones, and what cannot be read, to another file."""
    kept: list[bytes] = []
    dropped: list[bytes] = []
    for line in metrics.read_bytes().split(b"\n") if metrics.exists() else ():
        if line.strip():
            number = _object(line).get("step")
            known = not dropped and isinstance(number, int) and number < step
            (kept if known else dropped).append(line + b"\n")
    if dropped:
        with metrics.with_name("metrics.dropped.jsonl").open("ab") as file:
            file.writelines(dropped)
    write_whole(metrics, b"".join(kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The metrics of a run's folder, step by step; a last line cut off by a kill is left out."""
    file = path / "metrics.jsonl"
    if not file.exists():
        return []
    entries = []
    for line in file.read_bytes().split(b"\n"):
        entry = _object(line)
        if "step" not in entry:
            break
        entries.append(entry)
    return entries


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


# --- while it runs -------------------------------------------------------------------------------


class Display:
    """A live table on a terminal; elsewhere one line for each step."""

    def __init__(self, console: Console, steps: int) -> None:
        self.console = console
        self.steps = steps
        self._phase = ""
        self._history: list[Mapping[str, float]] = []
        self._live = Live(
            get_renderable=self._render, console=console, refresh_per_second=4, transient=False
        )

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._phase = ""
            self._live.stop()

    def phase(self, name: str) -> None:
        """What is being done now."""
        self._phase = name

    def say(self, line: str) -> None:
        """A line that stays."""
        self.console.print(Text(line), soft_wrap=True)  # as it is: errors are no markup

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is done."""
        self._history.append({"step": step, **metrics})
        if not self.console.is_terminal:
            shown = [
                f"{heading} {form.format(metrics[name])}"
                for name, form, heading in _SHOWN
                if name in metrics
            ]
            self.say(f"step {step + 1}/{self.steps}  " + "  ".join(shown))

    def _render(self) -> RenderableType:
        table = Table("step", *(heading for _, _, heading in _SHOWN), box=None)
        for entry in self._history[-8:]:
            cells = [form.format(entry[n]) if n in entry else "" for n, form, _ in _SHOWN]
            table.add_row(f"{int(entry['step']) + 1}/{self.steps}", *cells)
        rewards = [entry["reward/mean"] for entry in self._history]
        lines = [f"reward {_sparkline(rewards)}   {self._phase}"]
        for entry in self._history[-1:]:
            phases = [(name, entry.get(f"time/{name}")) for name in PHASES]
            lines += ["  ".join(f"{name} {spent:.1f} s" for name, spent in phases if spent)]
        return Group(table, Text("\n".join(lines), style="dim"))


def _sparkline(values: Sequence[float], width: int = 60) -> str:
    """Block characters, the last `width` values."""
    values = values[-width:]
    if not values:
        return ""
    low, high = min(values), max(values)
    return "".join("▁▂▃▄▅▆▇█"[int(7 * (v - low) / (high - low or 1))] for v in values)


# --- afterwards ----------------------------------------------------------------------------------

_CURVES = (
    ("reward/mean", "reward"),
    ("policy/entropy", "entropy of the policy (nats)"),
    ("correction/effective_sample_size", "effective sample size"),
    ("correction/kl", "KL(mu || pi_old) (nats per token)"),
    ("optim/grad_norm", "norm of the gradient"),
    ("rollout/length", "answer length (tokens)"),
)


def draw_curves(path: Path) -> Path:
    """curves.png of a run's folder. Raises FileNotFoundError without metrics."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries = read_metrics(path)
    if not entries:
        raise FileNotFoundError(f"{path} has no metrics.jsonl")
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), sharex=True, layout="constrained")
    for axis, (name, title) in zip(axes.flat, _CURVES, strict=True):
        points = [(entry["step"], entry[name]) for entry in entries if name in entry]
        axis.plot(*zip(*points, strict=True) if points else ([], []))
        axis.set(title=title)
    evaluated = sorted({name for entry in entries for name in entry if name.startswith("eval/")})
    for name in evaluated:
        points = [(entry["step"], entry[name]) for entry in entries if name in entry]
        axes.flat[0].plot(*zip(*points, strict=True), "o-", markersize=3, label=name)
    if evaluated:
        axes.flat[0].legend(fontsize="small")
    for axis in axes[1]:
        axis.set(xlabel="step")
    target = path / "curves.png"
    figure.savefig(target, dpi=130)
    plt.close(figure)
    return target
