"""`ead rollout`: a file of prompts to a file of answers, which goes on where it was stopped."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.text import Text

from ead_cli.options import never_connected
from ead_cli.rollout_files import answers_at
from ead_cli.rollout_prompts import Prompt
from ead_client import (
    Client,
    ConnectionFailed,
    EadError,
    Group,
    RequestRefused,
    ServerUnavailable,
    TimedOut,
)

T = TypeVar("T")

_PATIENCE_S = 300.0  # for a server that is gone to come back
_PAUSE_S = 2.0  # before it is asked again
_TRIES = 5  # of a prompt whose answers the server aborts
_GONE = (ConnectionFailed, ServerUnavailable, TimedOut)

# of one request, where the user does not say: prompts; answers and bytes, half and all of what
# servers allow by default
_PROMPTS, _ANSWERS, _BYTES = 64, 4096, 16 << 20


@dataclass(frozen=True)
class Asked:
    """What is asked of the server for every prompt."""

    n: int
    annealing: dict[str, Any] | None
    entropies: bool
    sampling_params: dict[str, Any]


def collect(
    client: Client,
    file: Path,
    prompts: Sequence[Prompt],
    asked: Asked,
    out: Path,
    *,
    per_call: int | None,
) -> dict[str, int]:
    """Have what is missing in `out` answered; counts of prompts: all, there before, failed.

    A prompt that fails is told and not written, so that a later call asks again. A server that
    goes away is waited for. per_call: prompts in one request; None: as many as servers allow.
    Raises EadError, before anything is written where that can be known.
    """
    if out.exists() and out.samefile(file):
        raise EadError(f"--out: {out} is the file of prompts")
    try:
        with answers_at(out) as answers:
            done = answers.open(_settings(asked, prompts), len(prompts))
            missing = [index for index in range(len(prompts)) if index not in done]
            with _progress() as bar:
                served: dict[str, Any] = {}
                if missing:
                    served = _found(lambda: _served(client), bar)
                    _say(bar, answers.check_served(served))
                news = _News(served.get("weight_version"))
                task = bar.add_task("prompts", total=len(prompts), completed=len(done))
                failed = 0
                for index, found in _answered(client, prompts, missing, asked, per_call, bar):
                    if isinstance(found, Group):
                        answers.write(index, found)
                        _say(bar, news.of(found))
                    else:
                        failed += 1
                        _say(bar, f"prompt {index}: {found} ({prompts[index].place})")
                    bar.advance(task)
    except OSError as error:
        if isinstance(error, EadError):
            raise
        raise EadError(f"cannot write {error.filename or out}: {error.strerror}") from None
    return {"prompts": len(prompts), "answered_before": len(done), "failed": failed}


class _News:
    """Whether other weights answer than at the beginning."""

    def __init__(self, version: str | None) -> None:
        self._known = {version}

    def of(self, group: Group) -> str | None:
        rollouts = [answer.rollout for answer in group.answers if answer.rollout is not None]
        new = {version for rollout in rollouts for version in rollout.versions} - self._known
        self._known |= new
        if not new or None in self._known:
            return None
        return f"weights of version {', '.join(sorted(new))} answer now, as each answer says"


def _settings(asked: Asked, prompts: Sequence[Prompt]) -> dict[str, Any]:
    sent = [prompt.sent for prompt in prompts]
    try:
        text = orjson.dumps(sent)
    except TypeError:  # what cannot be sent is told later
        text = repr(sent).encode()
    return {**asdict(asked), "prompts_sha256": hashlib.sha256(text).hexdigest()}


def _served(client: Client) -> dict[str, Any]:
    """What answers; the names of what a server does not tell are None."""
    info: dict[str, Any] = {}
    try:
        info = client.model_info()
    except RequestRefused as error:
        if error.status != 404:  # of SGLang's router, say
            raise
    return {
        "model": info.get("model_path"),
        "weight_version": info.get("weight_version"),
        "servers": client.base_urls,
    }


def _found(action: Callable[[], T], bar: Progress) -> T:
    """The result of the first call to the server. One that answers that it is starting is waited
    for; an address where nothing listens is taken for a wrong one, since SGLang listens only once
    the model is loaded."""
    until = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return action()
        except _GONE as error:
            if never_connected(error) or time.monotonic() > until:
                raise
            _say(bar, f"{error}; trying again")
            time.sleep(_PAUSE_S)


def _answered(
    client: Client,
    prompts: Sequence[Prompt],
    missing: Sequence[int],
    asked: Asked,
    per_call: int | None,
    bar: Progress,
) -> Iterator[tuple[int, Group | str]]:
    """The group of each missing prompt, as they complete, or why it has none."""
    for index in missing:
        if (problem := prompts[index].problem) is not None:
            yield index, problem
    left = [index for index in missing if prompts[index].problem is None]
    tries: Counter[int] = Counter()
    most: int | None = None  # after a refusal, to find the prompt that is to blame
    patient_until = time.monotonic() + _PATIENCE_S
    while left:
        now = _next(prompts, left, asked.n, most or per_call, said=per_call is not None)
        progress = False
        try:
            for group in client.stream_rollouts(
                [prompts[index].sent for index in now],
                n=asked.n,
                annealing=asked.annealing,
                entropies=asked.entropies,
                **asked.sampling_params,
            ):
                index = now[group.index]
                patient_until = time.monotonic() + _PATIENCE_S
                found = _judged(group)
                if found is None:  # aborted
                    tries[index] += 1
                    if tries[index] < _TRIES:
                        continue
                    found = f"its answers were aborted by the server, {_TRIES} times"
                left.remove(index)
                progress = True
                yield index, found
        except RequestRefused as error:
            if not (error.param or "").startswith("prompts") and error.status != 413:
                raise
            if len(now) > 1:
                most = len(now) // 2
                continue
            left.remove(now[0])
            most, progress = None, True
            yield now[0], error.message
        except _GONE as error:
            if time.monotonic() > patient_until:
                raise
            _say(bar, f"{error}; trying again")
            time.sleep(_PAUSE_S)
            continue
        if not progress:
            if not any(tries[index] for index in now):
                raise EadError("the server answered none of the prompts it was asked")
            _say(bar, "the server aborted its answers; asking again")
            time.sleep(_PAUSE_S)


def _judged(group: Group) -> Group | str | None:
    """The group, why it is none, or None where its answers were aborted before their end."""
    error = group.error or next((a.error for a in group.answers if a.error), None)
    if error is not None:
        return str(error.get("message"))
    return None if any(a.finish_reason == "abort" for a in group.answers) else group


def _next(
    prompts: Sequence[Prompt], left: Sequence[int], n: int, most: int | None, *, said: bool
) -> list[int]:
    """The prompts of the next request. said: the user says how many prompts one has."""
    now: list[int] = []
    answers = size = 0
    for index in left[: most or _PROMPTS]:
        own = prompts[index].sent.get("n")
        answers += own if type(own) is int else n
        size += prompts[index].size
        if now and not said and (answers > _ANSWERS or size > _BYTES):
            break
        now.append(index)
    return now


def _progress() -> Progress:
    return Progress(
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _say(bar: Progress, line: str | None) -> None:
    """As it is: what users and servers write is no markup."""
    if line is not None:
        bar.console.print(Text(line), soft_wrap=True)
