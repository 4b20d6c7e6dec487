"""The rows of a batch against a plain list that goes through the same filters and merges."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_schedule import closed_form, schedules

from ead_sampler import Annealing
from ead_sampler.rows import AnnealedRows, RowRequest
from ead_sampler.sampling import kept_mass


@dataclass(frozen=True)
class Row:
    """One request of the model: what it asks, its fixed temperature and its position."""

    request: RowRequest | None
    fixed: float
    position: int  # of the last token fed

    def temperature(self) -> float:
        if self.request is None or self.request.annealing is None:
            return self.fixed
        schedule = self.request.annealing
        t = self.position + 1 - self.request.num_prompt_tokens + schedule.position_offset
        return closed_form(t, schedule)


@st.composite
def row(draw: st.DrawFn) -> Row:
    prompt = draw(st.integers(1, 3000))
    request = draw(
        st.none()
        | st.builds(
            RowRequest,
            num_prompt_tokens=st.just(prompt),
            annealing=st.none() | schedules,
            entropies=st.booleans(),
        )
    )
    return Row(
        request, draw(st.floats(0.125, 2.0, width=32)), prompt - 1 + draw(st.integers(0, 4000))
    )


batches = st.lists(row(), min_size=1, max_size=6)


def check(rows: AnnealedRows | None, expected: list[Row]) -> None:
    if not any(r.request for r in expected):
        assert rows is None
        return
    assert rows is not None
    assert list(rows.requests) == [r.request for r in expected]
    assert rows.wants_entropies == any(r.request.entropies for r in expected if r.request)
    fixed = torch.tensor([[r.fixed] for r in expected])
    tau = rows.temperatures(torch.tensor([r.position for r in expected]), fixed)
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


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu() -> None:
    """One step's work on our side, with every host-device synchronisation made an error."""
    from types import SimpleNamespace

    from ead_sampler.sampling import MODEL_LOGITS, _sampled_values

    schedule = Annealing.model_validate({"step": 0})
    rows = AnnealedRows.build(
        [RowRequest(3, schedule, entropies=True), None, RowRequest(5)], "cuda"
    )
    assert rows is not None
    batch, vocabulary = 3, 1000
    logits = torch.randn(batch, vocabulary, device="cuda")
    info = SimpleNamespace(
        temperatures=torch.ones(batch, 1, device="cuda"),
        top_ks=torch.full((batch,), 50, device="cuda"),
        top_ps=torch.full((batch,), 0.9, device="cuda"),
        min_ps=torch.zeros(batch, device="cuda"),
        is_all_greedy=False,
        is_any_greedy=True,
        need_top_p_sampling=True,
        need_top_k_sampling=True,
        need_min_p_sampling=False,
    )
    setattr(info, MODEL_LOGITS, logits)
    positions = torch.tensor([7, 8, 9], device="cuda")
    token_ids = torch.tensor([1, 2, 3], device="cuda")
    keep = [2, 0]
    keep_device = torch.tensor(keep, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        info.temperatures = rows.temperatures(positions, info.temperatures)
        values = _sampled_values(logits.softmax(-1), token_ids, info, rows)
        AnnealedRows.merge(rows.filter(keep, keep_device), rows, 2, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(values).all()
