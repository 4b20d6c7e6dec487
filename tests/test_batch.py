"""Rollouts as packed tensors: every token and number in its place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ead_client import Rollout
from trainer_bridge.batch import RolloutBatch, Sample


def rollout(prompt: list[int], tokens: list[int], **columns: Any) -> Rollout:
    ones = [1.0] * len(tokens)
    names = ("temperatures", "logprobs", "model_logprobs")
    return Rollout(
        token_ids=tokens,
        prompt_token_ids=prompt,
        **{name: columns.get(name, ones) for name in names},
    )


def test_a_batch_keeps_every_token_and_number_in_place() -> None:
    first = rollout([5, 6, 7], [8, 9], temperatures=[0.5, 0.6], logprobs=[-1, -2])
    second = rollout([3], [4, 5, 6, 7], temperatures=[1.1, 1.2, 1.3, 1.4])
    batch = RolloutBatch.build([Sample.of(first), Sample.of(second)])
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9, 3, 4, 5, 6, 7]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    assert batch.input_ids[batch.targets].tolist() == [8, 9, 4, 5, 6, 7]
    assert batch.sequence_ids.tolist() == [0, 0, 1, 1, 1, 1]
    assert batch.temperatures.tolist() == pytest.approx([0.5, 0.6, 1.1, 1.2, 1.3, 1.4])
    assert batch.behaviour_logprobs.tolist() == [-1, -2, 1, 1, 1, 1]
    assert (len(batch), batch.num_tokens) == (2, 6)


def test_what_lies_between_the_turns_of_a_conversation_is_not_trained_on() -> None:
    first = rollout([1, 2], [3, 4], logprobs=[-3, -4])
    second = rollout([1, 2, 3, 4, 50, 51], [6], logprobs=[-6])  # 50, 51: a tool's answer
    batch = RolloutBatch.build([Sample.of(first, second)])
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 50, 51, 6]
    assert batch.targets.tolist() == [2, 3, 6]
    assert batch.behaviour_logprobs.tolist() == [-3, -4, -6]
    assert batch.sequence_ids.tolist() == [0, 0, 0]


def test_turns_that_do_not_follow_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="the prompt of turn 1 does not begin with"):
        Sample.of(rollout([1, 2], [3]), rollout([1, 2, 9], [4]))
    with pytest.raises(ValueError, match="turn 0 has no prompt ids or no tokens"):
        Sample.of(rollout([1], []))
    with pytest.raises(ValueError, match="needs a prompt"):
        Sample.of(rollout([], [1]))
    with pytest.raises(ValueError, match="at least one sample"):
        RolloutBatch.build([])


lengths = st.tuples(st.integers(1, 6), st.integers(1, 9))


@given(st.lists(lengths, min_size=1, max_size=9), st.integers(1, 30))
def test_parts_cover_a_batch_in_order_within_their_size(
    shapes: list[tuple[int, int]], max_tokens: int
) -> None:
    number = iter(range(1000))
    samples = [
        Sample.of(rollout([next(number) for _ in range(p)], [next(number) for _ in range(t)]))
        for p, t in shapes
    ]
    batch = RolloutBatch.build(samples)
    parts = list(batch.parts(max_tokens))
    assert [start for start, _ in parts] == [0, *[stop for _, stop in parts[:-1]]]
    assert parts[-1][1] == len(batch)
    for start, stop in parts:
        assert stop - start == 1 or sum(batch.lengths[start:stop]) <= max_tokens
    rows = [batch.rows(*part) for part in parts]
    assert torch.equal(torch.cat([row.input_ids for row in rows]), batch.input_ids)
    targets = torch.cat([row.input_ids[row.targets] for row in rows])
    assert torch.equal(targets, batch.input_ids[batch.targets])
    whole = torch.cat(
        [row.sequence_ids + start for row, (start, _) in zip(rows, parts, strict=True)]
    )
    assert torch.equal(whole, batch.sequence_ids)
