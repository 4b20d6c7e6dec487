"""The policy: packed log-probabilities, adapters, weights by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_batch import rollout

from trainer_bridge.batch import RolloutBatch, Sample
from trainer_bridge.errors import UnsupportedModel
from trainer_bridge.policy import (
    LoraConfig,
    ModelConfig,
    Policy,
    load_policy,
)

PROMPTS = [[5, 6, 7], [5, 6, 7], [300], [8, 9], [8, 9]]
ANSWERS = [[10, 11], [20], [12, 13, 14, 15], [400], [401, 402]]


def batch(share_prompts: bool = True) -> RolloutBatch:
    pairs = zip(PROMPTS, ANSWERS, strict=True)
    taus = iter([0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.3, 1.4, 1.5, 0.4])
    return RolloutBatch.build(
        [Sample.of(rollout(p, a, temperatures=[next(taus) for _ in a])) for p, a in pairs],
        share_prompts=share_prompts,
    )


def one_by_one(model: Any, temperatures: torch.Tensor) -> list[torch.Tensor]:
    """log pi, log pi at tau and entropy from full logits of each sample alone."""
    columns: list[list[torch.Tensor]] = [[], [], []]
    taus = iter(temperatures)
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        for row, token in zip(logits, answer, strict=True):
            log_pi = row.log_softmax(-1)
            columns[0].append(log_pi[token])
            columns[1].append((row / next(taus)).log_softmax(-1)[token])
            columns[2].append(-(log_pi.exp() * log_pi).sum())
    return [torch.stack(column) for column in columns]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("share_prompts", [False, True])
def test_packed_values_and_gradients_are_those_of_each_sample_alone(
    tiny_model: Path, checkpointing: bool, share_prompts: bool
) -> None:
    config = ModelConfig(path=str(tiny_model), gradient_checkpointing=checkpointing)
    policy, _ = load_policy(config, "cpu")
    packed = batch(share_prompts)
    got = policy(packed, tempered=True)
    sum(column.square().sum() for column in got).backward()
    gradients = {n: p.grad.clone() for n, p in policy.model.named_parameters()}
    policy.zero_grad()
    want = one_by_one(policy.model, packed.temperatures)
    sum(column.square().sum() for column in want).backward()
    for ours, theirs in zip(got, want, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    for name, parameter in policy.model.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad, atol=1e-3, rtol=1e-3), name


def test_bfloat16_compute_is_close_and_leaves_float32_weights(tiny_model: Path) -> None:
    exact, _ = load_policy(ModelConfig(path=str(tiny_model)), "cpu")
    rough, _ = load_policy(ModelConfig(path=str(tiny_model), compute_dtype="bfloat16"), "cpu")
    difference = rough(batch()).logprobs - exact(batch()).logprobs
    assert 0 < difference.abs().max() < 0.3
    assert {p.dtype for p in rough.parameters()} == {torch.float32}


def test_a_model_whose_logits_are_more_than_a_linear_head_is_refused(tiny_model: Path) -> None:
    policy, _ = load_policy(ModelConfig(path=str(tiny_model)), "cpu")
    model: Any = policy.model
    plain = model.forward

    def doubled(*args: Any, **keys: Any) -> Any:
        output = plain(*args, **keys)
        output.logits = output.logits * 2
        return output

    model.forward = doubled
    from trainer_bridge.policy import _check

    with pytest.raises(UnsupportedModel, match="packed log-probabilities differ"):
        _check(Policy(model))


def test_dropout_is_off_in_every_pass(tiny_model: Path, tmp_path: Path) -> None:
    """GPT-2's own settings drop a tenth: two passes of the same weights were 0.09 nats apart."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    gpt2 = GPT2Config(vocab_size=1024, n_positions=64, n_embd=16, n_layer=2, n_head=2)
    opt = OPTConfig(
        vocab_size=1024,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        layerdrop=0.5,
    )
    models: dict[str, Any] = {"gpt2": GPT2LMHeadModel(gpt2), "opt": OPTForCausalLM(opt)}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        policy, _ = load_policy(ModelConfig(path=str(tmp_path / name)), "cpu")
        made = batch(share_prompts=False)
        with torch.no_grad():
            passes = [policy(made).logprobs for _ in range(3)]
        assert torch.equal(passes[0], passes[1])
        assert torch.equal(passes[0], passes[2])


def adapted(tiny_model: Path) -> Policy:
    """A policy whose adapters do something."""
    policy, _ = load_policy(ModelConfig(path=str(tiny_model), lora=LoraConfig(rank=4)), "cpu")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.1)
    return policy


def test_with_lora_only_the_adapters_are_trained(tiny_model: Path) -> None:
    policy = adapted(tiny_model)
    assert all("lora_" in name for name, p in policy.named_parameters() if p.requires_grad)
    policy(batch()).logprobs.sum().backward()
    for name, weight in policy.named_parameters():
        assert (weight.grad is not None) == ("lora_" in name), name


@pytest.mark.parametrize("lora", [False, True])
def test_saved_weights_are_a_model_that_gives_the_same(
    tiny_model: Path, tmp_path: Path, lora: bool
) -> None:
    policy = adapted(tiny_model) if lora else load_policy(ModelConfig(path=str(tiny_model)))[0]
    tokenizer = load_policy(ModelConfig(path=str(tiny_model)), "cpu")[1]
    policy.save(tmp_path, tokenizer)
    again, _ = load_policy(ModelConfig(path=str(tmp_path)), "cpu")
    assert torch.allclose(again(batch()).logprobs, policy(batch()).logprobs, atol=1e-4)
    if lora:
        base, _ = load_policy(ModelConfig(path=str(tiny_model)), "cpu")
        assert (again(batch()).logprobs - base(batch()).logprobs).abs().max() > 0.1
        with policy.without_adapters():
            assert torch.allclose(policy(batch()).logprobs, base(batch()).logprobs, atol=1e-5)


def test_a_tied_weight_has_one_name(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    untied = {name for name, _ in Policy(model).named_weights()}
    model.config.tie_word_embeddings = True
    model.tie_weights()
    tied = {name for name, _ in Policy(model).named_weights()}
    assert untied - tied == {"lm_head.weight"}


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["lm_head"], ["embed_tokens"], ["no"]])
def test_adapters_that_would_not_be_trained_are_refused(
    targets: list[str], tiny_model: Path
) -> None:
    """Case 11."""
    lora = LoraConfig(rank=4, alpha=8, targets=targets)
    with pytest.raises(UnsupportedModel, match=r"model.lora.targets"):
        load_policy(ModelConfig(path=str(tiny_model), lora=lora), "cpu")
