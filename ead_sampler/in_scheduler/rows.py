"""The schedules of one running batch, one row per request, as tensors on the logits' device.

SGLang filters and merges its batches as requests finish and arrive; these rows follow. Whatever
kinds of schedule are mixed, a step costs one evaluation of each kind present, over all rows.

Kinds with state remember three numbers from token to token: the t at which their clock last
restarted, their phase (0: thinking, 1: answer) and a number of their own, as `branch` does. These
live in `memory`, a tensor with one line per request slot of SGLang, which only the sampling step
reads and writes: so they are right when the next step is scheduled before this one has ended. A
request that is computed anew (after retraction) starts from `initial`, what the host last saw.

Legend: B = rows of the batch, F = 2 phases, P = parameters, M = marks (token ids).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ead_sampler.schedules import MAX_KNOTS, REGISTRY, Annealing

KINDS = tuple(REGISTRY.values())
WIDTH = 2 * MAX_KNOTS  # P, of the kind with the most parameters
PHASES = 2
STATE_SIZE = 3  # clock's origin (t), phase, the kind's own number
State = tuple[float, float, float]
NO_SEED = -(1 << 63)

# what a row that asks for nothing has in each column
_NOTHING = {
    "kind": -1,  # int64 [B, F], index into KINDS
    "parameters": 1,  # float64 [B, F, P]
    "scale": 1,  # float64 [B, F]
    "start": 1,  # float64 [B]: a token sampled after position p has t = p + start
    # only where some row has a seed
    "seed": NO_SEED,  # int64 [B]
    # only where some row has state
    "slot": -1,  # int64 [B], line of `memory`; the last one belongs to rows without state
    "first": -1,  # int64 [B], position after which `initial` holds instead of `memory`
    "initial": 0,  # float32 [B, STATE_SIZE]
    "restarts": -1,  # int64 [B, M], marks that restart the clock
    "ends": -1,  # int64 [B, M], marks that end thinking
}


@dataclass(frozen=True)
class RowRequest:
    """What one request asks of the sampler. `annealing=None`: its own fixed temperature."""

    num_prompt_tokens: int
    annealing: Annealing | None = None
    arrays: bool = True  # record what the sampler did
    entropies: bool = False  # and the entropies too
    cuts: bool = True  # whether top_p, top_k or min_p may leave tokens out (greedy apart)
    seed: int | None = None  # in int64; the tokens are a function of it, of position and of logits

    @property
    def has_state(self) -> bool:
        return self.annealing is not None and self.annealing.has_state


@dataclass(frozen=True)
class Place:
    """Where a row with state stands: its slot, and where it begins or goes on."""

    slot: int
    first: int
    initial: State


NO_PLACE = Place(-1, -1, (0.0, 0.0, 0.0))


@dataclass(frozen=True, eq=False)
class AnnealedRows:
    """Immutable, so that a step still in flight keeps the rows that it was started with.

    Rows that asked for nothing ride along as None in `requests` and keep their temperature.
    """

    requests: tuple[RowRequest | None, ...]
    columns: dict[str, Tensor]  # see _NOTHING
    memory: Tensor | None = None  # float32 [slots + 1, STATE_SIZE]; None while no row has state

    @classmethod
    def build(
        cls,
        requests: Sequence[RowRequest | None],
        device: torch.device | str,
        places: Sequence[Place] = (),
        memory: Tensor | None = None,
    ) -> AnnealedRows | None:
        """Rows for a new batch; None when no request asks for anything.

        places, memory: needed when a request has state.
        """
        if not any(requests):
            return None
        kinds, parameters, scales, start = [], [], [], []
        for request in requests:
            schedule = request.annealing if request else None
            phases = schedule.phases() if schedule else ()
            rest = PHASES - len(phases)
            kinds.append([KINDS.index(type(phase)) for phase in phases] + [-1] * rest)
            numbers = [phase.parameters() for phase in phases] + [()] * rest
            parameters.append([[*row, *[1.0] * (WIDTH - len(row))] for row in numbers])
            scales.append([phase.scale() for phase in phases] + [1.0] * rest)
            offset = schedule.position_offset if schedule else 0
            start.append(offset + 1 - (request.num_prompt_tokens if request else 0))
        columns = {
            "kind": _to_device(kinds, torch.int64, device),
            "parameters": _to_device(parameters, torch.float64, device),
            "scale": _to_device(scales, torch.float64, device),
            "start": _to_device(start, torch.float64, device),
        }
        if any(request.seed is not None for request in requests if request):
            seeds = [request.seed if request else None for request in requests]
            filled = [NO_SEED if seed is None else seed for seed in seeds]
            columns["seed"] = _to_device(filled, torch.int64, device)
        if memory is None or not any(request.has_state for request in requests if request):
            return cls(tuple(requests), columns)
        columns |= {
            "slot": _to_device([place.slot for place in places], torch.int64, device),
            "first": _to_device([place.first for place in places], torch.int64, device),
            "initial": _to_device([place.initial for place in places], torch.float32, device),
            "restarts": _marks(requests, 0, device),
            "ends": _marks(requests, 1, device),
        }
        return cls(tuple(requests), columns, memory)

    # --- known on the host, worked out when the batch changes --------------------------------

    @cached_property
    def records(self) -> bool:
        """Whether any request wants what the sampler did."""
        return any(request.arrays for request in self.requests if request)

    @cached_property
    def wants_entropies(self) -> bool:
        """Whether a request wants entropies or a schedule depends on them."""
        asked = any(request.arrays and request.entropies for request in self.requests if request)
        return asked or any(phase.uses_entropy for phase in self._phases)

    @cached_property
    def cut(self) -> Tensor:
        """int64 [C], on the device: rows that record what was sampled from a cut distribution."""
        asked = enumerate(self.requests)
        cut = [row for row, request in asked if request and request.arrays and request.cuts]
        return _to_device(cut, torch.int64, self.columns["start"].device)

    @cached_property
    def seeded(self) -> bool:
        """Whether any request has a seed."""
        return any(request.seed is not None for request in self.requests if request)

    @cached_property
    def _phases(self) -> list[Annealing]:
        """Every phase of every row's schedule."""
        schedules = [request.annealing for request in self.requests if request]
        return [phase for schedule in schedules if schedule for phase in schedule.phases()]

    @cached_property
    def _kinds(self) -> tuple[int, ...]:
        """The kinds present, in any phase."""
        return tuple(sorted({KINDS.index(type(phase)) for phase in self._phases}))

    @cached_property
    def _own_numbers(self) -> tuple[tuple[int, int], ...]:
        """The kinds present with a number of their own, and which of their parameters it is."""
        own = ((index, KINDS[index].own_number) for index in self._kinds)
        return tuple((index, at) for index, at in own if at is not None)

    @cached_property
    def _all_annealed(self) -> bool:
        return all(request is not None and request.annealing for request in self.requests)

    @cached_property
    def _scaled(self) -> bool:
        return any(getattr(phase, "mean_matched", None) for phase in self._phases)

    @cached_property
    def _only_phase(self) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """Kind int64 [B], parameters float64 [B] each and scale float64 [B] of the first phase."""
        kind, parameters, scale = (self.columns[n][:, 0] for n in ("kind", "parameters", "scale"))
        return kind, parameters.unbind(1), scale

    # --- one step, without host-device synchronisation ---------------------------------------

    def seeds(self) -> Tensor:
        """int64 [B], fresh ones for rows that have none. Only where some row is `seeded`."""
        given = self.columns["seed"]
        return torch.where(given == NO_SEED, torch.randint_like(given, 1 << 62), given)

    def temperatures(
        self, positions: Tensor, fixed: Tensor, entropies: Tensor | None = None
    ) -> Tensor:
        """tau of the tokens now being sampled: float32 [B, 1].

        positions: int [B], position of the last token fed to the model, prompt included.
        fixed: float32 [B, 1], the requests' own temperatures, kept where nothing is annealed.
        entropies: float [B], nats, of the model's next-token distribution; needed when
        `wants_entropies`.
        """
        if not self._kinds:
            return fixed
        t = positions + self.columns["start"]
        if self.memory is None:
            kind, numbers, scale = self._only_phase
        else:
            origin, phase, number = self._state(positions).double().unbind(1)
            t = t - origin
            kind, parameters, scale = (
                column[torch.arange(len(t), device=t.device), phase.long()]
                for column in (self.columns[n] for n in ("kind", "parameters", "scale"))
            )
            for index, at in self._own_numbers:
                parameters[:, at] = torch.where(kind == index, number, parameters[:, at])
            numbers = parameters.unbind(1)
        entropy = t if entropies is None else entropies.double()  # no kind looks at it if None
        first, *others = self._kinds
        tau = KINDS[first].evaluate(t, numbers, entropy)
        for other in others:
            tau = torch.where(kind == other, KINDS[other].evaluate(t, numbers, entropy), tau)
        if self._scaled:
            tau = tau * scale
        tau = tau.to(fixed.dtype)
        if not self._all_annealed:
            tau = torch.where(kind >= 0, tau, fixed.view(-1))
        return tau.view(-1, 1)

    def remember(self, positions: Tensor, token_ids: Tensor, entropies: Tensor | None) -> Tensor:
        """Take in the tokens just sampled: float32 [B, STATE_SIZE], what holds after them.

        Arguments as in `temperatures`; token_ids: int [B]. Only where `memory` is not None.
        """
        assert self.memory is not None
        origin, phase, number = self._state(positions).double().unbind(1)
        tokens = token_ids.view(-1, 1)
        thinking = phase == 0
        ended = (tokens == self.columns["ends"]).any(1) & thinking
        restarted = (tokens == self.columns["restarts"]).any(1) & thinking | ended
        origin = torch.where(restarted, positions + self.columns["start"] + 1, origin)
        phase = torch.where(ended, 1.0, phase)
        if entropies is not None:
            kind, numbers, _ = self._only_phase
            for index, _ in self._own_numbers:
                moved = KINDS[index].next_number(number, numbers, entropies.double())
                number = torch.where(kind == index, moved, number)
        state = torch.stack([origin, phase, number], dim=1).float()
        self.memory.index_put_((self.columns["slot"],), state)
        return state

    def _state(self, positions: Tensor) -> Tensor:
        assert self.memory is not None
        begins = (positions == self.columns["first"]).unsqueeze(1)
        return torch.where(begins, self.columns["initial"], self.memory[self.columns["slot"]])

    # --- rows follow the batch ---------------------------------------------------------------

    def filter(self, keep: Sequence[int], keep_device: Tensor) -> AnnealedRows | None:
        """The rows `keep` (the same indices on the host and the device), in that order."""
        requests = tuple(self.requests[i] for i in keep)
        if not any(requests):
            return None
        columns = {name: column[keep_device] for name, column in self.columns.items()}
        return AnnealedRows(requests, columns, self.memory)

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
        columns_left = left.columns if left else {}
        columns_right = right.columns if right else {}
        columns = {
            name: _cat(name, columns_left.get(name), columns_right.get(name), num_left, num_right)
            for name in _NOTHING
            if name in columns_left or name in columns_right
        }
        memories = [rows.memory for rows in (left, right) if rows and rows.memory is not None]
        return AnnealedRows(
            (left.requests if left else (None,) * num_left)
            + (right.requests if right else (None,) * num_right),
            columns,
            memories[0] if memories else None,
        )


def _cat(
    name: str, left: Tensor | None, right: Tensor | None, num_left: int, num_right: int
) -> Tensor:
    """Two columns, one of which may be missing or narrower, one after the other."""
    fill = _NOTHING[name]
    if left is None:
        assert right is not None
        left = right.new_full((num_left, *right.shape[1:]), fill)
    if right is None:
        right = left.new_full((num_right, *left.shape[1:]), fill)
    if left.dim() == 2 and left.shape[1] != right.shape[1]:  # marks
        width = max(left.shape[1], right.shape[1])
        left, right = (
            torch.nn.functional.pad(column, (0, width - column.shape[1]), value=fill)
            for column in (left, right)
        )
    return torch.cat([left, right])


def _marks(requests: Sequence[RowRequest | None], which: int, device: torch.device | str) -> Tensor:
    """Token ids of each row's marks: int64 [B, M], padded with -1, M at least 1."""
    schedules = (request and request.annealing for request in requests)
    ids = [schedule.marks()[which] if schedule else () for schedule in schedules]
    width = max(1, *map(len, ids))
    return _to_device([[*row, *[-1] * (width - len(row))] for row in ids], torch.int64, device)


def _to_device(values: list, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A host list as a device tensor; pinned on a GPU, so that the copy does not block."""
    pin = torch.device(device).type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=pin).to(device, non_blocking=True)
