"""`ead rollout`: a file of prompts to a file of answers, which goes on where it was stopped.

Prompts are lines: of text (.txt), or of JSON (.jsonl) as /v1/rollouts takes them, where fields
that it does not know become metadata. Answers go to a .jsonl file, one line per prompt as it
completes, or to a folder, one safetensors file per prompt, named by its number. What was asked is
kept beside them, so that answers to other questions are never mixed in.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from ead_client import Client, ConnectionFailed, EadError, Group, ServerUnavailable, TimedOut

_PROMPT_FIELDS = {"text", "messages", "token_ids", "prefix_token_ids", "n", "metadata"}
_PATIENCE_S = 300.0  # for a server that is gone to come back


@dataclass(frozen=True)
class Asked:
    """What is asked of the server for every prompt."""

    n: int
    annealing: dict[str, Any] | None
    entropies: bool
    sampling_params: dict[str, Any]


def read_prompts(path: Path) -> list[Any]:
    """One per line. Raises EadError that names the line."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EadError(f"cannot read {path}: {error}") from None
    if path.suffix != ".jsonl":
        return [{"text": line} for line in lines if line.strip()]
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompts.append(_prompt(json.loads(line)))
        except ValueError as error:
            raise EadError(f"{path}:{number}: {error}") from None
    return prompts


def _prompt(raw: Any) -> dict[str, Any]:
    """A prompt as /v1/rollouts takes it. Raises ValueError."""
    if isinstance(raw, str):
        return {"text": raw}
    if isinstance(raw, list):
        return {"messages" if raw and isinstance(raw[0], dict) else "token_ids": raw}
    if not isinstance(raw, dict):
        raise ValueError(f"must be a text, a list or an object, got {raw!r:.100}")
    if "prompt" in raw and not _PROMPT_FIELDS & {*raw} - {"n", "metadata"}:
        raw = {**_prompt(raw["prompt"]), **{k: v for k, v in raw.items() if k != "prompt"}}
    unknown = {name: value for name, value in raw.items() if name not in _PROMPT_FIELDS}
    known = {name: value for name, value in raw.items() if name in _PROMPT_FIELDS}
    if unknown:
        given = known.get("metadata")
        known["metadata"] = {**unknown, **(given if isinstance(given, dict) else {})}
    return known


def collect(
    client: Client, prompts: Sequence[Any], asked: Asked, out: Path, *, per_call: int
) -> dict[str, int]:
    """Have what is missing in `out` answered; counts of prompts: all, there before, failed.

    A prompt that fails is told and not written, so that a later call asks again. A server that
    goes away is waited for. Raises EadError.
    """
    answers = _Lines(out) if out.suffix == ".jsonl" else _Folder(out)
    answers.check_settings(asked, prompts)
    done = answers.done()
    missing = [index for index in range(len(prompts)) if index not in done]
    bar = Progress(
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    failed = 0
    with bar:
        task = bar.add_task("prompts", total=len(prompts), completed=len(done))
        for index, group in _answered(client, prompts, missing, asked, per_call, bar):
            error = group.error or next((a.error for a in group.answers if a.error), None)
            if error is None:
                answers.write(index, group)
            else:
                failed += 1
                bar.console.print(f"prompt {index}: {error['message']}")
            bar.advance(task)
    return {"prompts": len(prompts), "answered_before": len(done), "failed": failed}


def _answered(
    client: Client,
    prompts: Sequence[Any],
    missing: list[int],
    asked: Asked,
    per_call: int,
    bar: Progress,
) -> Iterator[tuple[int, Group]]:
    """The group of each missing prompt, as they complete, with the prompt's index."""
    left = list(missing)
    patient_until = time.monotonic() + _PATIENCE_S
    while left:
        now = left[:per_call]
        try:
            for group in client.stream_rollouts(
                [prompts[index] for index in now],
                n=asked.n,
                annealing=asked.annealing,
                entropies=asked.entropies,
                **asked.sampling_params,
            ):
                left.remove(now[group.index])
                patient_until = time.monotonic() + _PATIENCE_S
                yield now[group.index], group
        except (ConnectionFailed, ServerUnavailable, TimedOut) as error:
            if time.monotonic() > patient_until:
                raise
            bar.console.print(f"{error}; trying again")
            time.sleep(2.0)


# --- where answers go --------------------------------------------------------------------------


class _Answers:
    """What both forms share."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._settings = path.with_name(f"{path.name}.settings.json")

    def check_settings(self, asked: Asked, prompts: Sequence[Any]) -> None:
        """Raises EadError when what is there was asked otherwise."""
        text = orjson.dumps(list(prompts))
        settings = {**asdict(asked), "prompts_sha256": hashlib.sha256(text).hexdigest()}
        if not self._settings.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.done():
                raise EadError(f"{self.path} exists, and nothing says what was asked; choose anew")
            self._settings.write_text(json.dumps(settings, indent=1))
            return
        before = json.loads(self._settings.read_text())
        for name in {*before, *settings}:
            if before.get(name) != settings.get(name):
                raise EadError(
                    f"{self.path} has answers with another {name}: "
                    f"{before.get(name)!r:.100}, not {settings.get(name)!r:.100}"
                )

    def done(self) -> set[int]:
        raise NotImplementedError

    def write(self, index: int, group: Group) -> None:
        raise NotImplementedError


class _Lines(_Answers):
    """A line of JSON per prompt."""

    def done(self) -> set[int]:
        """Of whole lines; a last one that was cut off is dropped."""
        if not self.path.exists():
            return set()
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        return {orjson.loads(line)["index"] for line in whole.splitlines()}

    def write(self, index: int, group: Group) -> None:
        line = {
            "index": index,
            "metadata": group.metadata,
            "prompt_token_ids": group.prompt_token_ids,
            "answers": [a.model_dump(exclude={"tokens", "error"}) for a in group.answers],
        }
        with self.path.open("ab") as file:
            file.write(orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n")


class _Folder(_Answers):
    """A safetensors file per prompt, as the server sent it."""

    def done(self) -> set[int]:
        return {int(file.stem) for file in self.path.glob("*.safetensors")}

    def write(self, index: int, group: Group) -> None:
        self.path.mkdir(exist_ok=True)
        partial = self.path / f"{index:06d}.partial"
        assert group.packed is not None
        partial.write_bytes(group.packed)
        partial.rename(self.path / f"{index:06d}.safetensors")
