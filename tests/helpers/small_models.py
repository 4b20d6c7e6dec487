"""Models of a few thousand weights, and answers to train them on."""

from __future__ import annotations

import itertools
import random
from typing import Any

import torch
from helpers.samples import rollout
from torch import Tensor

from trainer_bridge.policy.batch import Sample
from trainer_bridge.policy.trainer import ScoredAnswers

VOCABULARY, PROMPT, RATE, LONGEST = 40, 4, 0.5, 12


def make_model(kind: str, seed: int = 0) -> Any:
    """A causal LM of 64-bit floats that is made in milliseconds."""
    from transformers import (
        Gemma2Config,
        Gemma2ForCausalLM,
        GraniteConfig,
        GraniteForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        PhiConfig,
        PhiForCausalLM,
    )

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    model: Any
    if kind == "head bias":
        model = PhiForCausalLM(PhiConfig(**sizes))
        torch.nn.init.normal_(model.lm_head.bias)
    elif kind == "logits scaled":
        model = GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=2.0))
    elif kind == "soft cap":
        capped = {"final_logit_softcapping": 2.0, "attn_logit_softcapping": None, "head_dim": 8}
        model = Gemma2ForCausalLM(Gemma2Config(**sizes, **capped, sliding_window=64))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    return model.double().eval()


def rows_of(model: Any, prompt: list[int], tokens: list[int]) -> Tensor:
    """The logits that each token was sampled from: float64 [T, V]."""
    return (
        model(torch.tensor([prompt + tokens]), use_cache=False)
        .logits[0, len(prompt) - 1 : -1]
        .double()
    )  # type: ignore[no-any-return]


def chosen(rows: Tensor, tokens: list[int]) -> Tensor:
    return rows.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).squeeze(1)


def sampled(server: Any, draw: random.Random) -> tuple[ScoredAnswers, list[tuple[Any, ...]]]:
    """Answers to three prompts with the server's numbers: packed as the trainer takes them, and as
    (prompt, tokens, tau, log mu, log pi)."""
    samples, plain, rewards, group_ids = [], [], [], []
    for group, _ in itertools.product(range(3), range(3)):
        prompt = [random.Random(group).randrange(1, VOCABULARY) for _ in range(PROMPT)]
        tokens = [draw.randrange(1, VOCABULARY) for _ in range(draw.randrange(1, LONGEST))]
        tau = [round(draw.uniform(0.5, 1.6), 3) for _ in tokens]
        with torch.no_grad():
            rows = rows_of(server, prompt, tokens)
            log_mu = chosen(rows / torch.tensor(tau, dtype=torch.float64)[:, None], tokens)
            log_pi = chosen(rows, tokens)
        columns = {
            "temperatures": tau,
            "logprobs": log_mu.tolist(),
            "model_logprobs": log_pi.tolist(),
        }
        samples.append(Sample.of(rollout(prompt, tokens, **columns)))
        # as the trainer gets them: float32
        tau, mu, pi = (torch.tensor(values).float().double() for values in columns.values())
        plain.append((prompt, tokens, tau, mu, pi))
        rewards.append(float(draw.randrange(5)))
        group_ids.append(group)
    return ScoredAnswers(samples, rewards, group_ids), plain
