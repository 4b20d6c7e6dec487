"""Answers asked of the server in as many calls as its limits need."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from ead_client import Client, Group
from ead_client._fields import named_schedule

# of `ead serve`, unless it is told otherwise: --max-answers, --max-n
MOST_ANSWERS, MOST_OF_A_PROMPT = 4096, 128


def ask(
    client: Client,
    prompts: Sequence[Any],
    *,
    n: int,
    most_answers: int = MOST_ANSWERS,
    sampling_seed: int | None = None,
    **fields: Any,
) -> Iterator[Group]:
    """As `client.stream_rollouts`, whatever n and however many prompts: call after call, each for
    at most so many answers. A seed counts on over all of them as over those of one call.

    prompts: lists of messages. A group that is split over calls is yielded when all its parts are
    there; if one part failed, the group has its error.
    """
    if sampling_seed is not None:
        fields["sampling_seed"] = sampling_seed
    if n * len(prompts) <= most_answers and n <= MOST_OF_A_PROMPT:
        yield from client.stream_rollouts(prompts, n=n, **fields)
        return
    part = min(n, most_answers, MOST_OF_A_PROMPT)
    sizes = [min(part, n - first) for first in range(0, n, part)]
    asked = [(index, size) for index in range(len(prompts)) for size in sizes]
    came: defaultdict[int, dict[int, Group]] = defaultdict(dict)
    before = 0  # answers of the calls before
    while asked:
        call = _first_call(asked, most_answers)
        first_number = len(sizes) * len(prompts) - len(asked)
        asked = asked[len(call) :]
        if sampling_seed is not None:
            fields["sampling_seed"] = sampling_seed + before
        before += sum(size for _, size in call)
        if len(sizes) == 1:
            items = [prompts[index] for index, _ in call]
        else:
            items = [{"messages": prompts[index], "n": size} for index, size in call]
        for group in client.stream_rollouts(items, n=part, **fields):
            index = call[group.index][0]
            parts = came[index]
            parts[first_number + group.index] = group
            if len(parts) == len(sizes):
                yield _joined(index, [parts[number] for number in sorted(parts)])
                del came[index]


def _first_call(asked: list[tuple[int, int]], most_answers: int) -> list[tuple[int, int]]:
    call, left = 0, most_answers
    for _, size in asked:
        left -= size
        if left < 0:
            break
        call += 1
    return asked[:call]


def _joined(index: int, parts: Sequence[Group]) -> Group:
    answers = [answer for part in parts for answer in part.answers]
    numbered = [answer.model_copy(update={"index": i}) for i, answer in enumerate(answers)]
    error = next((part.error for part in parts if part.error is not None), None)
    return parts[0].model_copy(update={"index": index, "error": error, "answers": numbered})


def schedule_by_name(annealing: Any) -> Any:
    """A schedule as it may be set: by the name of a preset or of a kind, or as an object."""
    return named_schedule(annealing) if isinstance(annealing, str) else annealing
