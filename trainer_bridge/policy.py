"""The policy being trained: loading it, and the log-probabilities of sampled tokens under it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ead_sampler import device as engine
from trainer_bridge.batch import RolloutBatch

TOKENS_PER_CHUNK = 1024  # rows of [tokens, vocabulary] logits that exist at once


def load_policy(path: str | Path, device: torch.device | str | None = None) -> tuple[Any, Any]:
    """A Hugging Face causal LM in float32, and its tokenizer. device: default GPU if any.

    float32 holds the small updates that bfloat16 would round away; the server may serve bfloat16.
    """
    engine.choose()  # beside a CPU build of torch, transformers needs our torchvision schemas
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.to(device), AutoTokenizer.from_pretrained(path)


def token_logprobs(model: Any, batch: RolloutBatch) -> tuple[Tensor, Tensor]:
    """log pi of every generated token at temperature 1, and the entropy of pi there (nats).

    Both float32 [N]; the log-probabilities carry gradients, the entropies do not. The logits of
    all tokens never exist at once: the LM head runs in chunks, recomputed in the backward pass.
    """
    hidden = model.get_decoder()(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state
    # the hidden state at position p predicts the token at p + 1
    hidden = hidden[:, :-1][batch.generated[:, 1:]]
    targets = batch.input_ids[:, 1:][batch.generated[:, 1:]]
    head = model.get_output_embeddings()
    chunks = [
        checkpoint(_head_logprobs, head, rows, ids, use_reentrant=False)
        for rows, ids in zip(
            hidden.split(TOKENS_PER_CHUNK), targets.split(TOKENS_PER_CHUNK), strict=True
        )
    ]
    logprobs, entropies = (torch.cat(column) for column in zip(*chunks, strict=True))
    return logprobs, entropies


def _head_logprobs(head: Any, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = head(hidden).float()
    log_softmax = logits.log_softmax(dim=-1)
    with torch.no_grad():
        entropies = torch.special.entr(log_softmax.exp()).sum(dim=-1)
    return log_softmax.gather(1, targets.view(-1, 1)).squeeze(1), entropies
