"""Rollouts as tensors on the trainer's device, packed: no padding is stored or computed.

Legend: A = answers, L = all tokens, prompts included, answer after answer, N = trained tokens, the
ones that the policy chose, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ead_client import Rollout


@dataclass(frozen=True)
class Sample:
    """One answer as it is trained on: every token, and which of them the policy chose.

    Token ids are the server's, as sampled: nothing is tokenised again.
    """

    token_ids: NDArray[np.int64]  # [T], the prompt first
    trained: NDArray[np.bool_]  # [T]; false: prompt, tool or environment tokens
    temperatures: NDArray[np.float32]  # of the trained tokens, as the next two
    behaviour_logprobs: NDArray[np.float32]  # log mu
    model_logprobs: NDArray[np.float32]  # the server's log pi at temperature 1

    @classmethod
    def of(cls, *turns: Rollout) -> Sample:
        """One rollout, or the turns of one conversation: what lies between them (the answer of a
        tool or of an environment) is not trained on.

        Raises ValueError for a turn without prompt ids or without tokens, and where a turn's
        prompt does not begin with all that came before it.
        """
        token_ids = np.empty(0, np.int64)
        trained = np.empty(0, np.bool_)
        for number, turn in enumerate(turns):
            if turn.prompt_token_ids is None or len(turn) == 0:
                raise ValueError(f"turn {number} has no prompt ids or no tokens")
            prompt, past = turn.prompt_token_ids, len(token_ids)
            if not np.array_equal(prompt[:past], token_ids):
                raise ValueError(f"the prompt of turn {number} does not begin with what was before")
            token_ids = np.concatenate([prompt, turn.token_ids])
            trained = np.concatenate(
                [trained, np.zeros(len(prompt) - past, np.bool_), np.ones(len(turn), np.bool_)]
            )
        if not trained[1:].any() or trained[0]:
            raise ValueError("a sample needs a prompt, then tokens to train on")
        columns = (
            np.concatenate([getattr(turn, name) for turn in turns])
            for name in ("temperatures", "logprobs", "model_logprobs")
        )
        return cls(token_ids, trained, *columns)

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class RolloutBatch:
    """Samples end to end, each a sequence of its own to the policy."""

    input_ids: Tensor  # int64 [L]
    position_ids: Tensor  # int64 [L], from 0 in every sample
    targets: Tensor  # int64 [N], indices into L of the trained tokens
    sequence_ids: Tensor  # int64 [N], sample of each trained token
    temperatures: Tensor  # float32 [N]
    behaviour_logprobs: Tensor  # float32 [N], log mu
    model_logprobs: Tensor  # float32 [N], the server's log pi at temperature 1
    lengths: tuple[int, ...]  # tokens of each sample, A of them
    trained_lengths: tuple[int, ...]  # trained tokens of each sample

    @classmethod
    def build(cls, samples: Sequence[Sample], device: torch.device | str = "cpu") -> RolloutBatch:
        """One copy to the device per array. Raises ValueError without samples."""
        if not samples:
            raise ValueError("a batch needs at least one sample")
        lengths = [len(sample) for sample in samples]
        trained_lengths = [int(sample.trained.sum()) for sample in samples]

        def packed(name: str) -> NDArray[np.generic]:
            return np.concatenate([getattr(sample, name) for sample in samples])

        arrays = {
            "input_ids": packed("token_ids"),
            "position_ids": np.concatenate([np.arange(length) for length in lengths]),
            "targets": np.flatnonzero(packed("trained")),
            "sequence_ids": np.repeat(np.arange(len(samples)), trained_lengths),
            **{
                name: packed(name)
                for name in ("temperatures", "behaviour_logprobs", "model_logprobs")
            },
        }
        return cls(
            **{name: _to_device(array, device) for name, array in arrays.items()},
            lengths=tuple(lengths),
            trained_lengths=tuple(trained_lengths),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.targets)

    def rows(self, start: int, stop: int) -> RolloutBatch:
        """Samples start..stop, as views; sequence_ids count from 0."""
        tokens = slice(sum(self.lengths[:start]), sum(self.lengths[:stop]))
        trained = self.trained(start, stop)
        return RolloutBatch(
            input_ids=self.input_ids[tokens],
            position_ids=self.position_ids[tokens],
            targets=self.targets[trained] - tokens.start,
            sequence_ids=self.sequence_ids[trained] - start,
            temperatures=self.temperatures[trained],
            behaviour_logprobs=self.behaviour_logprobs[trained],
            model_logprobs=self.model_logprobs[trained],
            lengths=self.lengths[start:stop],
            trained_lengths=self.trained_lengths[start:stop],
        )

    def trained(self, start: int, stop: int) -> slice:
        """Where the trained tokens of samples start..stop lie in N."""
        return slice(sum(self.trained_lengths[:start]), sum(self.trained_lengths[:stop]))

    def parts(self, max_tokens: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of successive runs of samples of at most `max_tokens` tokens in all; a
        longer sample stands alone."""
        start = used = 0
        for index, length in enumerate(self.lengths):
            if index > start and used + length > max_tokens:
                yield start, index
                start, used = index, 0
            used += length
        yield start, len(self)


def _to_device(array: NDArray[np.generic], device: torch.device | str) -> Tensor:
    """Pinned for a GPU, so that the copies overlap."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
