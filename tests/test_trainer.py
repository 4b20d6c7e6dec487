"""The trainer bridge: its log-probabilities, its batches, and a whole step against the server."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Reference
from trainer_bridge.grpo import StaleRollout

from ead_client import Client, RequestRefused, Rollout
from trainer_bridge import (
    GrpoConfig,
    GrpoTrainer,
    RolloutBatch,
    WeightPublisher,
    group_advantages,
    load_policy,
    token_logprobs,
)

SCHEDULE = {"tau_max": 1.5, "tau_min": 0.3, "decay": 20.0, "warmup": 3}


def rollout(prompt: list[int], tokens: list[int], **fields: Any) -> Rollout:
    ones = [1.0] * len(tokens)
    return Rollout(
        token_ids=tokens,
        temperatures=fields.get("temperatures", ones),
        logprobs=fields.get("logprobs", ones),
        model_logprobs=fields.get("model_logprobs", ones),
        prompt_token_ids=prompt,
    )


def test_a_batch_keeps_every_token_and_number_in_place() -> None:
    batch = RolloutBatch.build(
        [
            rollout([5, 6, 7], [8, 9], temperatures=[0.5, 0.6]),
            rollout([3], [4, 5, 6, 7], temperatures=[1.1, 1.2, 1.3, 1.4]),
        ],
        pad_token_id=0,
    )
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [3, 4, 5, 6, 7]]
    assert batch.generated.int().tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]
    assert batch.sequence_ids.tolist() == [0, 0, 1, 1, 1, 1]
    assert batch.temperatures.tolist() == pytest.approx([0.5, 0.6, 1.1, 1.2, 1.3, 1.4])
    second = batch.rows(1, 2)
    assert second.input_ids.tolist() == [[3, 4, 5, 6, 7]]
    assert second.sequence_ids.tolist() == [0, 0, 0, 0]
    assert second.temperatures.tolist() == pytest.approx([1.1, 1.2, 1.3, 1.4])


def test_rows_lose_the_padding_that_only_longer_answers_needed() -> None:
    batch = RolloutBatch.build([rollout([5], [6]), rollout([5], [6, 7, 8, 9])], pad_token_id=0)
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert batch.rows(0, 1).input_ids.tolist() == [[5, 6]]


def test_an_answer_without_tokens_or_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="rollout 1 has no prompt ids or no tokens"):
        RolloutBatch.build([rollout([1], [2]), rollout([1], [])], pad_token_id=0)


def test_token_logprobs_and_gradients_equal_those_of_the_full_logits(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer_bridge.policy.TOKENS_PER_CHUNK", 3)
    policy, _ = load_policy(tiny_model, "cpu")
    prompts, answers = [[5, 6, 7], [300], [8, 9]], [[10, 11], [12, 13, 14, 15], [400]]
    pairs = list(zip(prompts, answers, strict=True))
    batch = RolloutBatch.build([rollout(p, a) for p, a in pairs], pad_token_id=0)
    got, entropies = token_logprobs(policy, batch)
    got.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in policy.named_parameters()}
    policy.zero_grad()

    want, want_entropies = [], []
    for prompt, answer in pairs:  # one by one, unpadded
        logits = policy(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        log_softmax = logits.log_softmax(-1)
        want.append(log_softmax.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1))
        want_entropies.append(-(log_softmax.exp() * log_softmax).sum(-1))
    torch.cat(want).square().sum().backward()
    assert torch.allclose(got, torch.cat(want), atol=1e-5)
    assert torch.allclose(entropies, torch.cat(want_entropies), atol=1e-5)
    for name, parameter in policy.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad, atol=1e-4, rtol=1e-4), name


# --- against the server --------------------------------------------------------------------------


@dataclass(frozen=True)
class Greeting:
    messages: tuple[dict[str, str], ...]


class SayMore:
    """Rewards answers by their number of distinct characters: every group has a signal."""

    name = "say more"

    def problem(self, index: int, split: str = "train") -> Greeting:
        return Greeting(({"role": "user", "content": f"{split} {index}"},))

    def reward(self, problem: Greeting, answer: str) -> float:
        return len(set(answer)) / 10


@pytest.fixture
def trainer(client: Client, tiny_model: Path, tmp_path: Path) -> Any:
    """A trainer that begins with the server's first weights, whatever ran before, and restores."""
    policy, tokenizer = load_policy(tiny_model, "cpu")
    publisher = WeightPublisher(client, tmp_path, dtype=torch.float32)
    publisher.publish(policy, 0)
    config = GrpoConfig(
        prompts_per_step=3,
        samples_per_prompt=4,
        max_new_tokens=16,
        annealing=SCHEDULE,
        learning_rate=1e-2,
        answers_per_forward=5,
    )
    yield GrpoTrainer(config, policy, tokenizer, SayMore(), client, publisher)
    original = {"model_path": str(tiny_model), "weight_version": "default"}
    assert client.request("POST", "/update_weights_from_disk", original, admin=True).json()[
        "success"
    ]


def test_after_a_step_the_server_samples_from_the_new_weights(
    trainer: GrpoTrainer, client: Client, tmp_path: Path
) -> None:
    before = {n: p.detach().clone() for n, p in trainer.policy.named_parameters()}
    phases: list[str] = []
    report = trainer.step(0, phases.append)
    assert phases == ["rollout", "score", "update", "publish"]
    assert set(report.seconds) == set(phases)
    assert (report.rollout_version, report.weight_version) == ("0", "1")
    assert client.model_info()["weight_version"] == "1"
    assert report.grad_norm > 0
    assert report.mismatch < 1e-4  # trainer and server agreed on the old weights, float32
    assert report.groups_with_signal == 1.0
    assert 0 < report.loss.effective_sample_size < 1  # mu is not pi: weights differ
    assert not list(tmp_path.iterdir())  # nothing is left on the disk

    prompt = trainer.tokenizer("def ")["input_ids"]
    answer = client.complete(prompt, annealing=SCHEDULE, max_tokens=24, ignore_eos=True)
    sampled = answer.choices[0].rollout
    assert sampled is not None
    assert sampled.weight_version == "1"
    batch = RolloutBatch.build([sampled], pad_token_id=0)
    with torch.no_grad():
        new, _ = token_logprobs(trainer.policy, batch)
        for name, parameter in trainer.policy.named_parameters():
            parameter.copy_(before[name])
        old, _ = token_logprobs(trainer.policy, batch)
    assert np.abs(sampled.model_logprobs - new.numpy()).max() < 1e-4
    assert np.abs(sampled.model_logprobs - old.numpy()).max() > 0.05  # the update did something


def test_the_next_step_reports_the_new_version(trainer: GrpoTrainer) -> None:
    first, second = trainer.step(0), trainer.step(1)
    assert (first.weight_version, second.rollout_version) == ("1", "1")
    assert {rollout.weight_version for rollout in second.rollouts} == {"1"}
    steps = {rollout.annealing["step"] for rollout in second.rollouts if rollout.annealing}
    assert steps == {1}


def test_accumulated_gradients_equal_those_of_one_forward(trainer: GrpoTrainer) -> None:
    problems = [SayMore().problem(i) for i in range(3)]
    choices = trainer.rollout(problems, 0)
    advantages = group_advantages(trainer.score(problems, choices))
    batch = RolloutBatch.build([c.rollout for c in choices if c.rollout], pad_token_id=0)
    start = {n: p.detach().clone() for n, p in trainer.policy.named_parameters()}

    def gradients(size: int, aggregation: Any) -> dict[str, torch.Tensor]:
        """The step's gradients, read off plain gradient descent with learning rate 1."""
        loss = replace(trainer.config.loss, aggregation=aggregation)
        trainer.config = replace(
            trainer.config, answers_per_forward=size, loss=loss, max_grad_norm=float("inf")
        )
        with torch.no_grad():
            for name, parameter in trainer.policy.named_parameters():
                parameter.copy_(start[name])
        trainer.optimizer = torch.optim.SGD(trainer.policy.parameters(), lr=1.0)
        trainer.update(batch, advantages)
        return {n: start[n] - p.detach() for n, p in trainer.policy.named_parameters()}

    for aggregation in ("token-mean", "seq-mean-token-mean"):
        whole, parts = gradients(100, aggregation), gradients(5, aggregation)
        for name, gradient in whole.items():
            assert torch.allclose(gradient, parts[name], atol=1e-5, rtol=1e-3), name


def test_stale_rollouts_are_refused(trainer: GrpoTrainer, client: Client, tmp_path: Path) -> None:
    WeightPublisher(client, tmp_path, dtype=torch.float32).publish(trainer.policy, 99)
    with pytest.raises(StaleRollout, match="expected version 0"):
        trainer.step(0)


def test_a_refused_weight_update_is_an_error_and_the_old_weights_stay(
    trainer: GrpoTrainer, client: Client, reference: Reference, tmp_path: Path
) -> None:
    class Broken:
        """Saves nothing that a server could load."""

        def state_dict(self) -> dict[str, torch.Tensor]:
            return {}

        def save_pretrained(self, folder: Path, **_: Any) -> None:
            folder.mkdir()

    publisher = WeightPublisher(client, tmp_path, dtype=torch.float32)
    with pytest.raises(RequestRefused):
        publisher.publish(Broken(), 5)
    assert client.model_info()["weight_version"] == "0"
    sampled = client.complete("def ", rollout=True, max_tokens=8).choices[0].rollout
    assert sampled is not None
    model = reference.logits(sampled.prompt_token_ids, sampled.token_ids).log_softmax(-1)
    want = model.gather(1, torch.from_numpy(sampled.token_ids).unsqueeze(1)).squeeze(1)
    assert np.abs(sampled.model_logprobs - want.numpy()).max() < 1e-4


def test_a_schedule_without_a_step_takes_the_count_of_weight_updates(
    trainer: GrpoTrainer, client: Client
) -> None:
    def step() -> int:
        answer = client.complete("def ", annealing=SCHEDULE, max_tokens=1)
        rollout = answer.choices[0].rollout
        assert rollout is not None
        assert rollout.annealing is not None
        return int(rollout.annealing["step"])

    before = step()
    trainer.publisher.publish(trainer.policy, 7)
    assert step() == before + 1
