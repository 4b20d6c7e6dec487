"""The embedded real model, `ead serve` without --model-path.

Served in float32, so that a Hugging Face forward of the same weights (float32 as well) must agree
to 1e-3 nats at every token; in bfloat16, SGLang and Hugging Face differ by 0.03 on average.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.closed_form import closed_form
from helpers.reference import Reference

from ead_client import Client, Rollout
from ead_sampler import parse_annealing
from ead_server.launch import models
from ead_server.launch.process import ServerProcess
from trainer_bridge import ModelConfig, Sample, SyncConfig, load_policy, weight_publisher

SCHEDULE = {"tau_max": 1.4, "tau_min": 0.4, "decay": 30.0, "warmup": 2, "step": 0}


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return models.pull()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    flags = ["--dtype", "float32"]
    with ServerProcess(flags, tmp_path_factory.mktemp("smollm2") / "server.log") as process:
        process.wait_until_ready()
        yield process


@pytest.fixture(scope="module")
def real(server: ServerProcess) -> Iterator[Client]:
    key = server.admin_api_key
    with Client(server.url, model="smollm2", admin_api_key=key, timeout=300) as client:
        yield client


@pytest.fixture(scope="module")
def rollouts(real: Client) -> list[Rollout]:
    answer = real.chat(
        [{"role": "user", "content": "Name three animals of the sea."}],
        annealing=SCHEDULE,
        rollout={"entropies": True},
        n=4,
        max_tokens=48,
        ignore_eos=True,
    )
    return [choice.rollout for choice in answer.choices if choice.rollout is not None]


def test_the_model_answers(real: Client) -> None:
    answer = real.chat(
        [{"role": "user", "content": "What is 2+3?"}], rollout=True, temperature=0, max_tokens=12
    )
    assert "5" in answer.choices[0].text
    assert real.model_info()["model_path"].endswith("SmolLM2-135M-Instruct")


def test_temperatures_follow_the_schedule_and_nothing_is_cut(rollouts: list[Rollout]) -> None:
    schedule = parse_annealing(SCHEDULE)
    want = [closed_form(t, schedule) for t in range(48)]
    for rollout in rollouts:
        assert np.abs(rollout.temperatures - want).max() < 1e-6
        assert rollout.sampling == {"top_p": 1.0, "top_k": -1, "min_p": 0.0}


def test_log_probabilities_equal_a_hugging_face_forward(
    smollm2: Path, rollouts: list[Rollout]
) -> None:
    reference = Reference(smollm2, torch.float32)
    errors: dict[str, list[np.ndarray]] = {"model": [], "behaviour": [], "entropy": []}
    shift = []
    for rollout in rollouts:
        logits = reference.logits(rollout.prompt_token_ids, rollout.token_ids)
        tau = torch.from_numpy(rollout.temperatures).double().unsqueeze(1)
        chosen = torch.from_numpy(rollout.token_ids).unsqueeze(1)
        model = logits.log_softmax(-1)
        behaviour = (logits / tau).log_softmax(-1).gather(1, chosen).squeeze(1).numpy()
        at_one = model.gather(1, chosen).squeeze(1).numpy()
        errors["model"].append(np.abs(rollout.model_logprobs - at_one))
        errors["behaviour"].append(np.abs(rollout.logprobs - behaviour))
        assert rollout.entropies is not None
        entropies = -(model.exp() * model).sum(-1).numpy()
        errors["entropy"].append(np.abs(rollout.entropies - entropies))
        shift.append(np.abs(behaviour - at_one))
    for name, values in errors.items():
        together = np.concatenate(values)
        assert together.max() < 1e-3, name
    assert np.concatenate(shift).mean() > 0.1  # or the comparison would not see a temperature


def test_published_weights_are_the_ones_served_although_embedding_and_head_are_tied(
    smollm2: Path, real: Client
) -> None:
    policy, tokenizer = load_policy(ModelConfig(path=str(smollm2)), "cpu")
    prompt = tokenizer("The sea is")["input_ids"]
    publisher = weight_publisher(real, SyncConfig())

    def gap() -> float:
        """Largest difference between the server's log pi and the trainer's, over 32 tokens."""
        sampled = real.complete(prompt, annealing=SCHEDULE, max_tokens=32, ignore_eos=True)
        rollout = sampled.choices[0].rollout
        assert rollout is not None
        with torch.no_grad():
            ours = policy(policy.batch([Sample.of(rollout)])).logprobs
        return float(np.abs(rollout.model_logprobs - ours.numpy()).max())

    assert gap() < 1e-3
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1 + 0.02 * torch.randn_like(parameter))
    assert gap() > 0.02
    report = publisher.publish(policy.named_weights(), 1)
    assert gap() < 1e-3
    assert report.num_bytes == 4 * sum(parameter.numel() for parameter in policy.parameters())


def test_weights_that_come_over_http_take_little_of_the_server_s_memory(
    smollm2: Path, server: ServerProcess, real: Client
) -> None:
    """538 MB of them; what the HTTP process grows by at its highest."""
    policy, _ = load_policy(ModelConfig(path=str(smollm2)), "cpu")
    process = Path(f"/proc/{server.process.pid}")

    def resident(name: str) -> int:
        """MB now (VmRSS), or at its highest since it was last forgotten (VmHWM)."""
        lines = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        return int(lines[name].split()[0]) // 1000

    before = resident("VmRSS")
    (process / "clear_refs").write_text("5")
    report = weight_publisher(real, SyncConfig()).publish(policy.named_weights(), 2)
    assert report.num_bytes > 500e6
    assert resident("VmHWM") - before < 50
