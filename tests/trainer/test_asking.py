"""Many answers are asked for in several calls, and come as those of one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ead_client import Group
from ead_client._types import Choice
from trainer_bridge.run.rollout_calls import MOST_ANSWERS, MOST_OF_A_PROMPT, ask


class Limited:
    """Answers with its prompt and the answer's seed; refuses what `ead serve` refuses."""

    def __init__(self, most_answers: int = MOST_ANSWERS) -> None:
        self.most_answers = most_answers
        self.calls: list[int] = []  # answers
        self.long: set[str] = set()

    def stream_rollouts(self, prompts: Any, *, n: int, **fields: Any) -> Iterator[Group]:
        items = [p if isinstance(p, dict) else {"messages": p, "n": n} for p in prompts]
        self.calls.append(sum(item["n"] for item in items))
        assert self.calls[-1] <= self.most_answers
        assert max(item["n"] for item in items) <= MOST_OF_A_PROMPT
        seed, groups = fields.get("sampling_seed"), []
        for index, item in enumerate(items):
            prompt = item["messages"][0]["content"]
            answers = []
            for number in range(item["n"]):
                text = f"{prompt} {None if seed is None else seed + number}"
                answers.append(Choice(index=number, text=text, finish_reason="length"))
            seed = None if seed is None else seed + item["n"]
            error = {"message": "too long"} if prompt in self.long else None
            kept = [] if error else answers
            groups.append(Group(index=index, error=error, prompt_token_ids=[], answers=kept))
        yield from reversed(groups)  # as they complete


def asked(client: Any, count: int, n: int, **fields: Any) -> dict[int, list[str]]:
    prompts = [[{"role": "user", "content": str(index)}] for index in range(count)]
    groups = list(ask(client, prompts, n=n, **fields))
    assert len({group.index for group in groups}) == len(groups) == count
    for group in groups:
        assert [answer.index for answer in group.answers] == list(range(len(group.answers)))
    return {group.index: [answer.text for answer in group.answers] for group in groups}


@given(st.integers(1, 12), st.integers(1, 300), st.integers(1, 400))
def test_answers_and_their_seeds_are_those_of_one_call(
    count: int, n: int, most_answers: int
) -> None:
    client = Limited(most_answers)
    found = asked(client, count, n, most_answers=most_answers, sampling_seed=7)
    assert found == {i: [f"{i} {7 + i * n + j}" for j in range(n)] for i in range(count)}
    assert sum(client.calls) == count * n


@pytest.mark.parametrize(("count", "n", "calls"), [(64, 64, 1), (65, 64, 2), (8, 128, 1)])
def test_what_one_call_can_ask_for_is_asked_for_at_once(count: int, n: int, calls: int) -> None:
    client = Limited()
    assert len(asked(client, count, n)) == count
    assert len(client.calls) == calls


def test_an_error_of_a_part_is_its_group_s() -> None:
    client: Any = Limited()
    client.long = {"1"}
    prompts = [[{"role": "user", "content": str(index)}] for index in range(3)]
    groups = {group.index: group for group in ask(client, prompts, n=200)}
    assert [groups[index].error is None for index in range(3)] == [True, False, True]
    assert len(groups[2].answers) == 200
