"""The policy: packed log-probabilities, adapters, weights by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.samples import rollout
from safetensors.torch import load_file

from trainer_bridge.errors import UnsupportedModel
from trainer_bridge.policy.batch import RolloutBatch, Sample
from trainer_bridge.policy.policy import (
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


WINDOW = 4  # tokens; prompts below are longer
KINDS = ("bias", "divided", "multiplied", "soft cap", "window", "experts", "tied")


def saved(kind: str, tiny_model: Path, folder: Path) -> Path:
    """A model as one finds it, with something between its hidden states and its logits, a window,
    experts, or one matrix for embedding and head."""
    import transformers as hf

    sizes: dict[str, Any] = {
        "vocab_size": 1024,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "tie_word_embeddings": kind == "tied",
    }
    torch.manual_seed(0)
    model: Any
    if kind == "bias":
        model = hf.PhiForCausalLM(hf.PhiConfig(**sizes))
        torch.nn.init.normal_(model.lm_head.bias)
    elif kind == "divided":
        model = hf.GraniteForCausalLM(hf.GraniteConfig(**sizes, logits_scaling=2.0))
    elif kind == "multiplied":
        model = hf.CohereForCausalLM(hf.CohereConfig(**sizes, logit_scale=0.5))
    elif kind == "soft cap":
        more = {"final_logit_softcapping": 2.0, "head_dim": 8, "sliding_window": WINDOW}
        model = hf.Gemma2ForCausalLM(hf.Gemma2Config(**sizes, **more))
    elif kind == "window":
        more = {"sliding_window": WINDOW, "head_dim": 8}
        model = hf.MistralForCausalLM(hf.MistralConfig(**sizes, **more))
    elif kind == "experts":
        more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
        model = hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**sizes, **more, head_dim=8))
    else:
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes))
    model.save_pretrained(folder)
    hf.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])
@pytest.mark.parametrize("kind", KINDS)
def test_models_as_one_finds_them_are_computed_and_saved_as_they_are(
    kind: str, adapters: bool, tiny_model: Path, tmp_path: Path
) -> None:
    """Log-probabilities and gradients are those of transformers' own forward of the same file; and
    what is saved (and published), adapters merged, is a file that gives the policy's."""
    from transformers import AutoModelForCausalLM

    path = saved(kind, tiny_model, tmp_path / "model")
    targets = ["q_proj", "v_proj"] if kind == "experts" else "all-linear"
    lora = LoraConfig(rank=2, targets=targets) if adapters else None
    policy, tokenizer = load_policy(ModelConfig(path=str(path), lora=lora), "cpu")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    prompt = list(range(5, 15))
    turns = [rollout(p, a) for p in (prompt, [300]) for a in ([20, 21, 22], [30], [40, 41])]
    samples = [Sample.of(turn) for turn in turns]

    def alone(model: Any) -> torch.Tensor:
        rows = []
        for sample in samples:
            ids = torch.from_numpy(sample.token_ids)
            logits = model(ids[None], use_cache=False).logits[0, sample.prompt_length - 1 : -1]
            own = ids[sample.prompt_length :, None]
            rows.append(logits.log_softmax(-1).gather(1, own).squeeze(1))
        return torch.cat(rows)

    got, want = policy(policy.batch(samples)).logprobs, alone(model)
    assert torch.allclose(got, want, atol=1e-5)
    got.square().sum().backward()
    if not adapters:
        want.square().sum().backward()
        gradients = {name: weight.grad for name, weight in policy.model.named_parameters()}
        for name, weight in model.named_parameters():
            assert torch.allclose(gradients[name], weight.grad, atol=1e-3, rtol=1e-3), name
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn(weight.shape))
        policy.save(tmp_path / "trained", tokenizer)
        files = [load_file(at / "model.safetensors") for at in (path, tmp_path / "trained")]
        assert files[0].keys() == files[1].keys()
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained", dtype=torch.float32)
        now = policy(policy.batch(samples)).logprobs
        assert (now - want).abs().max() > 0.01  # or nothing was trained
        assert torch.allclose(alone(again), now, atol=1e-4)


def test_bfloat16_compute_is_close_in_values_and_gradients_and_leaves_float32_weights(
    tiny_model: Path,
) -> None:
    """Eight bits of mantissa through two layers: 0.02 nats on average, and 6 % of a gradient at
    most, are measured. Twice that, and a little, is allowed."""
    seen = []
    for dtype in ("float32", "bfloat16"):
        config = ModelConfig(path=str(tiny_model), compute_dtype=dtype)
        policy, _ = load_policy(config, "cpu")
        values = policy(batch(), tempered=True)
        sum(column.sum() for column in values).backward()
        assert {p.dtype for p in policy.parameters()} == {torch.float32}
        seen.append((torch.cat(values), dict(policy.named_parameters())))
    (exact, want), (rough, got) = seen
    difference = (rough - exact).abs()
    assert 0 < difference.mean() < 0.05
    assert difference.max() < 0.2
    for name, weight in want.items():
        assert (got[name].grad - weight.grad).norm() < 0.15 * weight.grad.norm(), name


def test_a_model_whose_logits_are_more_than_a_linear_head_is_refused(tiny_model: Path) -> None:
    policy, _ = load_policy(ModelConfig(path=str(tiny_model)), "cpu")
    model: Any = policy.model
    plain = model.forward

    def doubled(*args: Any, **keys: Any) -> Any:
        output = plain(*args, **keys)
        output.logits = output.logits * 2
        return output

    model.forward = doubled
    from trainer_bridge.policy.policy import _check

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


@pytest.mark.parametrize("targets", ["all-linear", ["gate_proj", "up_proj", "q_proj"]])
def test_adapters_on_experts_are_refused(
    targets: str | list[str], tiny_model: Path, tmp_path: Path
) -> None:
    """They were trained, but neither merged nor published: the saved model had random experts."""
    path = saved("experts", tiny_model, tmp_path / "model")
    with pytest.raises(UnsupportedModel, match=r"an adapter on model.layers.0.mlp.*experts"):
        load_policy(ModelConfig(path=str(path), lora=LoraConfig(rank=2, targets=targets)), "cpu")


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["lm_head"], ["embed_tokens"], ["no"]])
def test_adapters_that_would_not_be_trained_are_refused(
    targets: list[str], tiny_model: Path
) -> None:
    """Case 11."""
    lora = LoraConfig(rank=4, alpha=8, targets=targets)
    with pytest.raises(UnsupportedModel, match=r"model.lora.targets"):
        load_policy(ModelConfig(path=str(tiny_model), lora=lora), "cpu")
