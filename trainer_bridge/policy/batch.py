"""Rollouts as tensors on the trainer's device, packed: no padding is stored or computed.

Legend: A = answers, L = all tokens, prompts included, answer after answer, N = trained tokens, the
ones that the policy chose, in the same order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

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

    @cached_property
    def prompt_length(self) -> int:
        """Tokens before the first trained one."""
        return int(self.trained.argmax())

    @cached_property
    def num_trained(self) -> int:
        return int(self.trained.sum())


@dataclass(frozen=True)
class RolloutBatch:
    """Samples end to end, each a sequence of its own to the policy.

    With shared prompts, neighbours that begin with the same prompt (a GRPO group) have it once: L
    is then the prompt and all its answers, each of which sees the prompt and itself.
    """

    samples: tuple[Sample, ...]  # A of them
    input_ids: Tensor  # int64 [L]
    position_ids: Tensor  # int64 [L], of each token in its sample
    prompt_of: Tensor | None  # int64 [L], the same for a prompt and its answers; None: none shared
    sample_of: Tensor | None  # int64 [L], -1 for a prompt; None likewise
    targets: Tensor  # int64 [N], the trained tokens
    predicting_positions: Tensor  # int64 [N], index into L of the token before each of them
    sequence_ids: Tensor  # int64 [N], sample of each trained token
    temperatures: Tensor  # float32 [N]
    behaviour_logprobs: Tensor  # float32 [N], log mu
    model_logprobs: Tensor  # float32 [N], the server's log pi at temperature 1

    @classmethod
    def build(
        cls,
        samples: Sequence[Sample],
        device: torch.device | str = "cpu",
        *,
        share_prompts: bool = False,
    ) -> RolloutBatch:
        """One copy to the device per array. Raises ValueError without samples."""
        if not samples:
            raise ValueError("a batch needs at least one sample")
        shared = _shared_lengths(samples) if share_prompts else [0] * len(samples)
        ids, positions, predicting_positions, prompt_of, sample_of = [], [], [], [], []
        prompt_start = length = 0
        for number, (sample, prompt_length) in enumerate(zip(samples, shared, strict=True)):
            if prompt_length == 0:  # brings its own prompt
                prompt_start, first = length, 0
            else:
                first = prompt_length
            own = len(sample) - first
            at = np.arange(first, len(sample))
            ids.append(sample.token_ids[first:])
            positions.append(at)
            before = np.flatnonzero(sample.trained) - 1
            shift = np.where(before < first, prompt_start, length - first)
            predicting_positions.append(before + shift)
            prompt_of.append(np.full(own, prompt_start))
            # a prompt that others share is nobody's own
            own_prompt = sample.prompt_length if first == 0 else 0
            sample_of.append(np.where(at < own_prompt, -1, number))
            length += own
        arrays = {
            "input_ids": np.concatenate(ids),
            "position_ids": np.concatenate(positions),
            "targets": np.concatenate([sample.token_ids[sample.trained] for sample in samples]),
            "predicting_positions": np.concatenate(predicting_positions),
            "sequence_ids": np.repeat(
                np.arange(len(samples)), [sample.num_trained for sample in samples]
            ),
            **{
                name: np.concatenate([getattr(sample, name) for sample in samples])
                for name in ("temperatures", "behaviour_logprobs", "model_logprobs")
            },
        }
        tensors: dict[str, Any] = {name: _to_device(a, device) for name, a in arrays.items()}
        for name, lists in (("prompt_of", prompt_of), ("sample_of", sample_of)):
            joined = np.concatenate(lists) if share_prompts else None
            tensors[name] = None if joined is None else _to_device(joined, device)
        return cls(samples=tuple(samples), **tensors)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.targets)

    @cached_property
    def attention_mask(self) -> Tensor | None:
        """Which tokens (columns) each token sees: bool [L, L]; None where no prompt is shared. Made
        when it is asked for: of a micro-batch, never of a whole one."""
        if self.prompt_of is None or self.sample_of is None:
            return None
        return _attention_mask(self.prompt_of, self.sample_of)

    def select(self, start: int, stop: int) -> RolloutBatch:
        """The batch of samples start..stop alone."""
        return RolloutBatch.build(
            self.samples[start:stop],
            self.input_ids.device,
            share_prompts=self.prompt_of is not None,
        )

    def token_slice(self, start: int, stop: int) -> slice:
        """Where the trained tokens of samples start..stop lie in N."""
        counts = [sample.num_trained for sample in self.samples[:stop]]
        return slice(sum(counts[:start]), sum(counts))

    def micro_batches(self, max_tokens: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of successive runs of samples of at most `max_tokens` tokens in all; a
        longer sample stands alone."""
        shared = [0] * len(self) if self.prompt_of is None else _shared_lengths(self.samples)
        start = used = 0
        for index, sample in enumerate(self.samples):
            added = len(sample) - shared[index]
            if index > start and used + added > max_tokens:
                yield start, index
                start, used, added = index, 0, len(sample)
            used += added
        yield start, len(self)


def _shared_lengths(samples: Sequence[Sample]) -> list[int]:
    """Tokens of each sample's prompt that the sample before it has too: all of them or none."""
    lengths = [0]
    for before, sample in itertools.pairwise(samples):
        prompt = sample.token_ids[: sample.prompt_length]
        same = np.array_equal(before.token_ids[: before.prompt_length], prompt)
        lengths.append(sample.prompt_length if same else 0)
    return lengths


def _attention_mask(prompt_of: Tensor, sample_of: Tensor) -> Tensor:
    """Each token sees the prompt and the tokens before it of its own sample: bool [L, L].

    prompt_of: int [L], the same for all tokens of a prompt and its answers. sample_of: int [L],
    -1 for the prompt.
    """
    same_prompt = prompt_of[:, None] == prompt_of
    visible = (sample_of == -1) | (sample_of[:, None] == sample_of)
    return (same_prompt & visible).tril()


def _to_device(array: NDArray[np.generic], device: torch.device | str) -> Tensor:
    """Pinned for a GPU, so that the copies overlap."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
