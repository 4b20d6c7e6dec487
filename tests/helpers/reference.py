"""The tiny server's flags, and an independent forward pass of its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

# float32, so that a Hugging Face forward of the same weights agrees to many digits; an attention
# in plain torch also on a GPU, where the fast ones take neither float32 nor heads as small
TINY_FLAGS = (
    *("--dtype", "float32", "--attention-backend", "torch_native"),
    *("--max-total-tokens", "65536", "--random-seed", "7"),
)


class Reference:
    """An independent forward pass: Hugging Face, float32 weights, float64 arithmetic after it."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)

    @torch.no_grad()
    def logits(self, prompt_ids: Any, answer_ids: Any) -> torch.Tensor:
        """The logits that each answer token was sampled from: float64 [T, V]."""
        ids = torch.tensor([[*prompt_ids, *answer_ids]])
        return self.model(ids).logits[0, len(prompt_ids) - 1 : -1].double()
