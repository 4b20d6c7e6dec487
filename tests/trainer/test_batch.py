"""Rollouts as packed tensors: every token and number in its place."""

from __future__ import annotations

import pytest
import torch
from helpers.samples import rollout
from hypothesis import given
from hypothesis import strategies as st

from trainer_bridge.policy.batch import RolloutBatch, Sample


def test_a_batch_keeps_every_token_and_number_in_place() -> None:
    first = rollout([5, 6, 7], [8, 9], temperatures=[0.5, 0.6], logprobs=[-1, -2])
    second = rollout([3], [4, 5, 6, 7], temperatures=[1.1, 1.2, 1.3, 1.4])
    batch = RolloutBatch.build([Sample.of(first), Sample.of(second)])
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9, 3, 4, 5, 6, 7]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    assert batch.targets.tolist() == [8, 9, 4, 5, 6, 7]
    assert batch.input_ids[batch.predicting_positions].tolist() == [7, 8, 3, 4, 5, 6]
    assert batch.sequence_ids.tolist() == [0, 0, 1, 1, 1, 1]
    assert batch.temperatures.tolist() == pytest.approx([0.5, 0.6, 1.1, 1.2, 1.3, 1.4])
    assert batch.behaviour_logprobs.tolist() == [-1, -2, 1, 1, 1, 1]
    assert (len(batch), batch.num_tokens) == (2, 6)


def test_what_lies_between_the_turns_of_a_conversation_is_not_trained_on() -> None:
    first = rollout([1, 2], [3, 4], logprobs=[-3, -4])
    second = rollout([1, 2, 3, 4, 50, 51], [6], logprobs=[-6])  # 50, 51: a tool's answer
    batch = RolloutBatch.build([Sample.of(first, second)])
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 50, 51, 6]
    assert batch.targets.tolist() == [3, 4, 6]
    assert batch.predicting_positions.tolist() == [1, 2, 5]
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


def test_a_group_has_its_prompt_once_and_answers_see_it_and_themselves() -> None:
    group = [rollout([5, 6], [7, 8]), rollout([5, 6], [9]), rollout([5, 6], [10, 11])]
    other = rollout([5, 9], [12])
    batch = RolloutBatch.build([Sample.of(r) for r in [*group, other]], share_prompts=True)
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9, 10, 11, 5, 9, 12]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 2, 2, 3, 0, 1, 2]
    assert batch.targets.tolist() == [7, 8, 9, 10, 11, 12]
    assert batch.predicting_positions.tolist() == [1, 2, 1, 1, 5, 8]
    assert batch.attention_mask is not None
    seen = [row.nonzero().flatten().tolist() for row in batch.attention_mask]
    assert seen == [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 1, 2, 3],
        [0, 1, 4],
        [0, 1, 5],
        [0, 1, 5, 6],
        [7],
        [7, 8],
        [7, 8, 9],
    ]


lengths = st.tuples(st.integers(1, 6), st.integers(1, 9), st.booleans())


@given(st.lists(lengths, min_size=1, max_size=9), st.integers(1, 30), st.booleans())
def test_parts_cover_a_batch_in_order_within_their_size(
    shapes: list[tuple[int, int, bool]], max_tokens: int, share: bool
) -> None:
    number = iter(range(1000))
    prompt = [next(number)]
    samples = []
    for prompt_length, length, same in shapes:
        prompt = prompt if same else [next(number) for _ in range(prompt_length)]
        samples.append(Sample.of(rollout(prompt, [next(number) for _ in range(length)])))
    batch = RolloutBatch.build(samples, share_prompts=share)
    parts = list(batch.micro_batches(max_tokens))
    assert [start for start, _ in parts] == [0, *[stop for _, stop in parts[:-1]]]
    assert parts[-1][1] == len(batch)
    rows = [batch.select(*part) for part in parts]
    for (start, stop), row in zip(parts, rows, strict=True):
        assert stop - start == 1 or len(row.input_ids) <= max_tokens
        own = batch.token_slice(start, stop)
        assert torch.equal(row.targets, batch.targets[own])
        assert torch.equal(row.sequence_ids + start, batch.sequence_ids[own])
        before = batch.input_ids[batch.predicting_positions[own]]
        assert torch.equal(row.input_ids[row.predicting_positions], before)
