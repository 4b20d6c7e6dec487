"""The rows of a batch against a plain list that goes through the same filters and merges."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.kinds import FORMULAS, STATELESS, raw_schedules
from hypothesis import given
from hypothesis import strategies as st

from ead_sampler import Annealing, parse_annealing
from ead_sampler.in_scheduler import sampling
from ead_sampler.in_scheduler.rows import NO_PLACE, STATE_SIZE, AnnealedRows, Place, RowRequest
from ead_sampler.in_scheduler.sampling import entropy_of, kept_mass
from ead_sampler.in_scheduler.seeds import only_kept
from ead_sampler.selftest import sampling_info


def tau_of(schedule: Annealing, t: int, entropy: float) -> float:
    raw = schedule.model_dump(exclude_unset=True)
    return FORMULAS[schedule.schedule](t, raw, entropy) * schedule.scale()


@dataclass(frozen=True)
class Row:
    """One request of the model: what it asks, its fixed temperature and its position."""

    request: RowRequest | None
    fixed: float
    position: int  # of the last token fed
    entropy: float

    def temperature(self) -> float:
        if self.request is None or self.request.annealing is None:
            return self.fixed
        schedule = self.request.annealing
        t = self.position + 1 - self.request.num_prompt_tokens + schedule.position_offset
        return tau_of(schedule, t, self.entropy)


stateless = st.builds(
    lambda raw, step, offset: parse_annealing({**raw, "step": step, "position_offset": offset}),
    raw_schedules(STATELESS),
    st.integers(0, 1000),
    st.integers(0, 3000),
)


@st.composite
def row(draw: st.DrawFn) -> Row:
    prompt = draw(st.integers(1, 3000))
    request = draw(
        st.none()
        | st.builds(
            RowRequest,
            num_prompt_tokens=st.just(prompt),
            annealing=st.none() | stateless,
            arrays=st.booleans(),
            entropies=st.booleans(),
        )
    )
    return Row(
        request,
        draw(st.floats(0.125, 2.0, width=32)),
        prompt - 1 + draw(st.integers(0, 4000)),
        draw(st.floats(0.0, 12.0)),
    )


batches = st.lists(row(), min_size=1, max_size=6)


def check(rows: AnnealedRows | None, expected: list[Row]) -> None:
    if not any(r.request for r in expected):
        assert rows is None
        return
    assert rows is not None
    assert list(rows.requests) == [r.request for r in expected]
    asked = [r.request for r in expected if r.request]
    assert rows.records == any(request.arrays for request in asked)
    assert rows.wants_entropies == any(
        (request.arrays and request.entropies)
        or (request.annealing is not None and "entropy" in request.annealing.schedule)
        for request in asked
    )
    fixed = torch.tensor([[r.fixed] for r in expected])
    entropies = torch.tensor([r.entropy for r in expected], dtype=torch.float64)
    tau = rows.temperatures(torch.tensor([r.position for r in expected]), fixed, entropies)
    assert tau.shape == fixed.shape
    assert tau.dtype == torch.float32
    want = [r.temperature() for r in expected]
    assert tau.flatten().tolist() == pytest.approx(want, rel=1e-6)


@given(batches, batches, st.data())
def test_rows_follow_every_filter_and_merge(
    left: list[Row], right: list[Row], data: st.DataObject
) -> None:
    a = AnnealedRows.build([r.request for r in left], "cpu")
    b = AnnealedRows.build([r.request for r in right], "cpu")
    check(a, left)

    merged = AnnealedRows.merge(a, b, len(left), len(right))
    both = left + right
    check(merged, both)

    keep = data.draw(st.lists(st.sampled_from(range(len(both))), unique=True, min_size=1))
    filtered = merged.filter(keep, torch.tensor(keep)) if merged else None
    check(filtered, [both[i] for i in keep])
    check(merged, both)  # a step in flight still sees the rows that it was started with

    again = AnnealedRows.merge(filtered, a, len(keep), len(left))
    check(again, [both[i] for i in keep] + left)


# --- rows with state ---------------------------------------------------------------------------


class Story:
    """One request's life: what it generated, and its state worked out again from the beginning."""

    def __init__(self, request: RowRequest | None, prompt: int) -> None:
        self.request = request
        self.prompt = prompt
        self.tokens: list[int] = []
        self.entropies: list[float] = []
        self.slot = -1
        self.state: tuple[float, float, float] | None = None  # as the host last saw it

    def place(self) -> Place:
        if self.request is None or not self.request.has_state:
            return NO_PLACE
        assert self.request.annealing is not None
        initial = self.state or self.request.annealing.initial_state([])
        return Place(self.slot, self.prompt + len(self.tokens) - 1, initial)

    def temperature(self, entropy: float) -> float:
        """tau of the next token; 0.5 is every plain row's own."""
        schedule = self.request.annealing if self.request else None
        if schedule is None:
            return 0.5
        origin, part = 0, schedule
        if schedule.schedule == "segment":
            part = schedule.thinking
            for t, token in enumerate(self.tokens):
                if token in schedule.end_of_thinking_token_ids:
                    origin, part = t + 1, schedule.answer
                    break
                if token in schedule.restart_token_ids:
                    origin = t + 1
        if schedule.schedule == "branch":
            threshold = schedule.threshold
            for seen in self.entropies:
                threshold += schedule.rate * ((seen > threshold) - schedule.top)
            return schedule.tau_max if entropy > threshold else schedule.tau_min
        return tau_of(part, len(self.tokens) - origin, entropy)


# sharp enough that a clock off by one token shows
SEGMENT = {
    "schedule": "segment",
    "thinking": {"schedule": "linear", "length": 20},
    "restart_token_ids": [1, 2],
    "answer": {"schedule": "linear", "tau_max": 0.9, "length": 30},
    "end_of_thinking_token_ids": [3],
}
asks = st.none() | st.builds(
    RowRequest,
    num_prompt_tokens=st.just(0),
    annealing=st.one_of(
        st.just(SEGMENT), st.just({"schedule": "branch", "rate": 0.5}), raw_schedules()
    ).map(parse_annealing),
)


@given(st.lists(asks, min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_clocks_phases_and_thresholds_survive_batching_and_retraction(
    requests: list[RowRequest | None], random: Random
) -> None:
    """Requests come, finish and are retracted in random order; slots are used again at once."""
    memory = torch.zeros(4 + 1, STATE_SIZE)
    free = [0, 1, 2, 3]
    waiting = []
    for request in requests:
        prompt = random.randint(1, 20)
        asked = request and replace(request, num_prompt_tokens=prompt)
        waiting.append(Story(asked, prompt))
    running: list[Story] = []
    rows: AnnealedRows | None = None

    def step(batch: list[Story], rows: AnnealedRows | None) -> None:
        """One sampling step; the rows object may be used by a batch that changed since."""
        positions = torch.tensor([story.prompt + len(story.tokens) - 1 for story in batch])
        # exact in float32, and far from the round numbers that a threshold may come back to
        odd = 1 / 128 + 1 / 2048 + 1 / 32768 + 1 / 524288
        entropies = [random.randint(0, 640) / 64 + odd for _ in batch]
        tokens = [random.randint(0, 14) for _ in batch]
        if rows is None:
            assert not any(story.request for story in batch)
        else:
            h = torch.tensor(entropies)
            tau = rows.temperatures(positions, torch.full((len(batch), 1), 0.5), h)
            want = [story.temperature(e) for story, e in zip(batch, entropies, strict=True)]
            assert tau.flatten().tolist() == pytest.approx(want, rel=1e-5)
            if rows.memory is not None:
                after = rows.remember(positions, torch.tensor(tokens), h)
                for story, state in zip(batch, after.tolist(), strict=True):
                    story.state = (state[0], state[1], state[2])
        for story, token, entropy in zip(batch, tokens, entropies, strict=True):
            story.tokens.append(token)
            story.entropies.append(entropy)

    for _ in range(60):
        if waiting and free and random.random() < 0.5:
            new = [waiting.pop(0) for _ in range(random.randint(1, min(len(waiting), len(free))))]
            for story in new:
                story.slot = free.pop(0)
            prefilled = AnnealedRows.build(
                [story.request for story in new], "cpu", [story.place() for story in new], memory
            )
            step(new, prefilled)
            rows = AnnealedRows.merge(rows, prefilled, len(running), len(new))
            running = running + new
        if running and random.random() < 0.3:
            leaving = random.randrange(len(running))
            keep = [i for i in range(len(running)) if i != leaving]
            story = running[leaving]
            free.append(story.slot)
            if random.random() < 0.7:
                waiting.append(story)  # retracted: prefilled again later
            rows = rows.filter(keep, torch.tensor(keep, dtype=torch.long)) if rows else None
            running = [running[i] for i in keep]
        if running:
            step(running, rows)


def naive_kept_mass(
    probs: list[float], top_k: int, top_p: float, min_p: float, renormalised: bool
) -> float:
    """Token by token, in float64, as the sampler's documentation words it."""
    ordered = sorted(probs, reverse=True)
    within = sum(ordered[:top_k]) if renormalised else 1.0
    mass = before = 0.0
    for rank, p in enumerate(ordered):
        if rank < top_k and before / within <= top_p and p >= min_p * ordered[0]:
            mass += p
        before += p
    return mass


# fractions that no sum of the weights below equals, so that rounding cannot decide a comparison
cuts = st.integers(0, 10_006).map(lambda k: (k + 0.5) / 10_007)


@given(
    st.lists(st.integers(1, 1000), min_size=2, max_size=40, unique=True),
    st.integers(1, 50),
    cuts,
    cuts,
    st.booleans(),
)
def test_kept_mass_equals_a_naive_count(
    weights: list[int], top_k: int, top_p: float, min_p: float, renormalised: bool
) -> None:
    probs = [w / sum(weights) for w in weights]
    got = kept_mass(
        torch.tensor([probs], dtype=torch.float64),
        torch.tensor([top_k]),
        torch.tensor([top_p], dtype=torch.float64),
        torch.tensor([min_p], dtype=torch.float64),
        renormalised=renormalised,
    )
    assert got.item() == pytest.approx(naive_kept_mass(probs, top_k, top_p, min_p, renormalised))


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=40, unique=True), cuts, cuts)
def test_what_is_cut_has_probability_0_and_the_rest_its_own(
    weights: list[int], top_p: float, min_p: float
) -> None:
    """Two rows, of which the second has no cuts."""
    probs = torch.tensor([weights, weights], dtype=torch.float64) / sum(weights)
    top_ps, min_ps = torch.tensor([[top_p, 1.0], [min_p, 0.0]], dtype=torch.float64)
    got = only_kept(probs, torch.tensor([10, 1 << 30]), top_ps, min_ps)
    assert torch.equal(got[1], probs[1])
    assert got[0].sum().item() == pytest.approx(
        naive_kept_mass(probs[0].tolist(), 10, top_p, min_p, renormalised=False)
    )
    assert torch.equal(got[0], probs[0].where(got[0] > 0, 0.0))
    assert got[0][got[0] > 0].min() > probs[0].masked_fill(got[0] > 0, 0.0).max()


@pytest.mark.parametrize("rows", [1, 7])
def test_entropies_equal_a_float64_sum_also_where_tokens_are_impossible(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(rows, 151_936, generator=generator)  # several pieces, see _AT_ONCE_CPU
    logits[:, 5:99] = -math.inf
    exact = logits.double().softmax(-1)
    want = torch.special.entr(exact).sum(-1)
    got = entropy_of(logits.log_softmax(-1))
    # torch's float32 log_softmax is off by 1e-5 over so many tokens, and the entropy by a few times
    assert got.tolist() == pytest.approx(want.tolist(), abs=2e-4)
    one_hot = torch.tensor([[0.0, -math.inf, -math.inf]])
    assert entropy_of(one_hot).tolist() == [0.0]


@pytest.mark.parametrize("on", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_nothing_waits_for_the_device(on: str) -> None:
    """One step's work on our side, in which every look at a value from the host is an error.

    Tensors on "meta" have no values: item(), tolist(), nonzero() or a bool of one raise. On a GPU,
    torch raises at whatever synchronises, and a profiler's trace shows neither a wait nor a copy
    to the host. What leaves is copied by the function SGLang gives, once for the values and once
    for the state.
    """
    from ead_sampler.in_scheduler import sampling

    schedules: list[dict[str, Any]] = [
        {"step": 0},
        {"schedule": "piecewise", "knots": [[0, 1.0], [50, 0.5]]},
        {"schedule": "entropy"},
        {"schedule": "branch"},
        {"schedule": "segment", "thinking": {}, "restart_token_ids": [2]},
    ]
    asked = [RowRequest(3, parse_annealing(raw), entropies=True) for raw in schedules]
    batch, vocabulary = len(asked) + 2, 1000
    places = [Place(slot, 7, (0.0, 0.0, 0.5)) for slot in range(batch)]
    memory = torch.zeros(batch + 1, STATE_SIZE, device=on)
    rows = AnnealedRows.build([*asked, None, RowRequest(5)], on, places, memory)
    assert rows is not None
    info = replace(
        sampling_info(batch, vocabulary, on),
        top_ks=torch.full((batch,), 50, device=on),
        top_ps=torch.full((batch,), 0.9, device=on),
        is_any_greedy=True,
        need_top_p_sampling=True,
        need_top_k_sampling=True,
    )
    logits = torch.randn(batch, vocabulary, device=on)
    output = SimpleNamespace(next_token_logits=logits, auxiliary_device_output=None)
    positions = torch.arange(batch, device=on) + 7
    token_ids = torch.arange(batch, device=on)
    keep = [2, 0]
    keep_device = torch.tensor(keep).to(on)

    def sampler(self: None, output: Any, *_: Any) -> torch.Tensor:
        output.next_token_logits.copy_((output.next_token_logits / info.temperatures).softmax(-1))
        return token_ids

    def step() -> None:
        setattr(info, sampling.ROWS, rows)
        sampling.keep_model_logprobs(None, output, info)
        output.auxiliary_device_output = None
        sampling.sample(sampler, None, output, info, False, [], [], positions)
        AnnealedRows.merge(rows.filter(keep, keep_device), rows, 2, batch)

    step()
    if on == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.profiler.profile() as trace:
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        names = {event.name for event in trace.events()}
        waits = ("StreamSynchronize", "EventSynchronize", "DtoH")
        assert not {name for name in names if any(wait in name for wait in waits)}
    copied: list[torch.Tensor] = []

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        copied.append(tensor)
        return tensor

    output.auxiliary_device_output.copy_to_host(copy)
    assert [tuple(tensor.shape) for tensor in copied] == [(batch, 4), (batch, STATE_SIZE)]
    assert {tensor.device.type for tensor in copied} == {on}


def test_only_rows_that_record_and_cut_are_sorted_and_a_few_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rest keep their log-probabilities, and memory is bounded whatever the batch."""
    asked = [
        RowRequest(4, cuts=True),
        RowRequest(4, cuts=False),
        None,
        RowRequest(4, arrays=False, cuts=True),
        *[RowRequest(4, cuts=True)] * 6,
    ]
    rows = AnnealedRows.build(asked, "cpu")
    assert rows is not None
    assert rows.cut.tolist() == [0, 4, 5, 6, 7, 8, 9]
    monkeypatch.setattr(sampling, "_AT_ONCE_CPU", 4 * 2 * 64)
    seen: list[int] = []
    mass = sampling.kept_mass

    def counted(probs: torch.Tensor, *cuts: torch.Tensor, **how: bool) -> torch.Tensor:
        seen.append(len(probs))
        return mass(probs, *cuts, **how)

    monkeypatch.setattr(sampling, "kept_mass", counted)
    info = sampling_info(len(asked), 64, "cpu")
    info.top_ps, info.need_top_p_sampling = torch.full((len(asked),), 0.5), True
    torch.manual_seed(0)
    probs = torch.randn(len(asked), 64).softmax(-1)
    tokens = probs.argmax(-1)
    values = sampling._sampled_values(probs, tokens, info, rows, probs.log(), None)
    assert seen == [2, 2, 2, 1]
    whole = mass(probs, info.top_ks, info.top_ps, info.min_ps)
    want = probs.amax(-1).log()
    want[rows.cut] -= whole[rows.cut].log()
    assert (values[:, 1] - want).abs().max() < 1e-6
