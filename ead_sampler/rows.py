"""The schedules of one running batch, one row per request, as tensors on the logits' device.

SGLang filters and merges its batches as requests finish and arrive; these rows follow. Legend:
B = rows of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ead_sampler.schedule import Annealing, ead_temperatures


@dataclass(frozen=True)
class RowRequest:
    """What one request asks of the sampler. `annealing=None`: its own fixed temperature."""

    num_prompt_tokens: int
    annealing: Annealing | None = None
    entropies: bool = False


@dataclass(frozen=True, eq=False)
class AnnealedRows:
    """Immutable, so that a step still in flight keeps the rows that it was started with.

    Rows that asked for nothing ride along as None in `requests` and keep their temperature.
    """

    requests: tuple[RowRequest | None, ...]
    parameters: Tensor  # float64 [B, 4], see ead_temperatures
    start: Tensor  # int64 [B]: a token sampled after position p has t = p + start
    annealed: Tensor  # bool [B]

    @classmethod
    def build(
        cls, requests: Sequence[RowRequest | None], device: torch.device | str
    ) -> AnnealedRows | None:
        """Rows for a new batch; None when no request asks for anything."""
        if not any(requests):
            return None
        parameters, start, annealed = [], [], []
        for request in requests:
            schedule = request.annealing if request else None
            parameters.append(schedule.parameters() if schedule else (1.0, 1.0, 1.0, 0.0))
            offset = schedule.position_offset if schedule else 0
            start.append(offset + 1 - (request.num_prompt_tokens if request else 0))
            annealed.append(schedule is not None)
        return cls(
            requests=tuple(requests),
            parameters=_to_device(parameters, torch.float64, device),
            start=_to_device(start, torch.int64, device),
            annealed=_to_device(annealed, torch.bool, device),
        )

    @property
    def wants_entropies(self) -> bool:
        return any(request.entropies for request in self.requests if request)

    def temperatures(self, positions: Tensor, fixed: Tensor) -> Tensor:
        """tau of the tokens now being sampled: float32 [B, 1]. No host-device synchronisation.

        positions: int [B], position of the last token fed to the model, prompt included.
        fixed: float32 [B, 1], the requests' own temperatures, kept where nothing is annealed.
        """
        t = positions.to(torch.int64) + self.start
        scheduled = ead_temperatures(t, self.parameters).to(fixed.dtype)
        return torch.where(self.annealed, scheduled, fixed.view(-1)).view(-1, 1)

    def filter(self, keep: Sequence[int], keep_device: Tensor) -> AnnealedRows | None:
        """The rows `keep` (the same indices on the host and the device), in that order."""
        requests = tuple(self.requests[i] for i in keep)
        if not any(requests):
            return None
        return AnnealedRows(
            requests,
            self.parameters[keep_device],
            self.start[keep_device],
            self.annealed[keep_device],
        )

    @staticmethod
    def merge(
        left: AnnealedRows | None,
        right: AnnealedRows | None,
        num_left: int,
        num_right: int,
    ) -> AnnealedRows | None:
        """Rows of `left` followed by rows of `right`, either of which may hold nothing."""
        if left is None and right is None:
            return None
        left = left or _empty_rows(num_left, right)
        right = right or _empty_rows(num_right, left)
        return AnnealedRows(
            left.requests + right.requests,
            torch.cat([left.parameters, right.parameters]),
            torch.cat([left.start, right.start]),
            torch.cat([left.annealed, right.annealed]),
        )


def _empty_rows(count: int, like: AnnealedRows | None) -> AnnealedRows:
    """`count` rows that ask for nothing, on the device of `like`."""
    assert like is not None
    return AnnealedRows(
        (None,) * count,
        like.parameters.new_ones((count, like.parameters.shape[1])),
        like.start.new_ones(count),
        like.annealed.new_zeros(count),
    )


def _to_device(values: list, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A host list as a device tensor; pinned on a GPU, so that the copy does not block."""
    pin = torch.device(device).type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=pin).to(device, non_blocking=True)
