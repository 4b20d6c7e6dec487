"""Rollouts as tensors on the trainer's device.

Legend: B = answers, L = longest prompt + answer, N = generated tokens, packed answer after answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ead_client import Rollout


@dataclass(frozen=True)
class RolloutBatch:
    """Answers with their prompts, and the server's per-token numbers of the generated tokens."""

    input_ids: Tensor  # int64 [B, L]: prompt, answer, padding
    attention_mask: Tensor  # int64 [B, L]: 1 for prompt and answer
    generated: Tensor  # bool [B, L]: the tokens that were generated
    sequence_ids: Tensor  # int64 [N]: row of each generated token
    temperatures: Tensor  # float32 [N]
    behaviour_logprobs: Tensor  # float32 [N], log mu
    model_logprobs: Tensor  # float32 [N], the server's log pi at temperature 1

    @classmethod
    def build(
        cls,
        rollouts: Sequence[Rollout],
        *,
        pad_token_id: int,
        device: torch.device | str = "cpu",
    ) -> RolloutBatch:
        """Token ids exactly as sampled: nothing is tokenised again.

        Raises ValueError for an empty answer or one without its prompt's ids.
        """
        for index, rollout in enumerate(rollouts):
            if rollout.prompt_token_ids is None or len(rollout) == 0:
                raise ValueError(f"rollout {index} has no prompt ids or no tokens")
        prompts = [np.asarray(rollout.prompt_token_ids) for rollout in rollouts]
        length = max(
            len(prompt) + len(rollout) for prompt, rollout in zip(prompts, rollouts, strict=True)
        )
        input_ids = np.full((len(rollouts), length), pad_token_id, dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        generated = np.zeros(input_ids.shape, dtype=bool)
        for row, (prompt, rollout) in enumerate(zip(prompts, rollouts, strict=True)):
            end = len(prompt) + len(rollout)
            input_ids[row, : len(prompt)] = prompt
            input_ids[row, len(prompt) : end] = rollout.token_ids
            attention_mask[row, :end] = 1
            generated[row, len(prompt) : end] = True
        lengths = [len(rollout) for rollout in rollouts]

        def packed(name: str) -> Tensor:
            columns = [getattr(rollout, name) for rollout in rollouts]
            return torch.from_numpy(np.concatenate(columns)).to(device)

        return cls(
            input_ids=torch.from_numpy(input_ids).to(device),
            attention_mask=torch.from_numpy(attention_mask).to(device),
            generated=torch.from_numpy(generated).to(device),
            sequence_ids=torch.from_numpy(np.repeat(np.arange(len(rollouts)), lengths)).to(device),
            temperatures=packed("temperatures"),
            behaviour_logprobs=packed("logprobs"),
            model_logprobs=packed("model_logprobs"),
        )

    def __len__(self) -> int:
        return len(self.input_ids)

    def rows(self, start: int, stop: int) -> RolloutBatch:
        """Answers start..stop, without the padding that only longer ones needed."""
        used = int(self.attention_mask[start:stop].sum(dim=1).max())
        tokens = (self.sequence_ids >= start) & (self.sequence_ids < stop)
        return RolloutBatch(
            self.input_ids[start:stop, :used],
            self.attention_mask[start:stop, :used],
            self.generated[start:stop, :used],
            self.sequence_ids[tokens] - start,
            self.temperatures[tokens],
            self.behaviour_logprobs[tokens],
            self.model_logprobs[tokens],
        )
