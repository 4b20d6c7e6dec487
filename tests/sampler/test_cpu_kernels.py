"""The plain-torch `sgl_kernel` against computations written here as naive loops.

The package is imported in this process through `use_torch_kernels`, as a server does. The checks of
what is and is not found on the search path run in fresh interpreters.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ead_sampler import cpu_kernels

ROOT = Path(cpu_kernels.__file__).resolve().parents[2]
U32 = 0xFFFFFFFF
INT32_AND_INT64 = pytest.mark.parametrize("dtype", [torch.int32, torch.int64])

if not cpu_kernels.compiled_kernels_available():
    cpu_kernels.use_torch_kernels()
else:
    pytest.skip("a compiled sgl_kernel is installed here", allow_module_level=True)

import sgl_kernel  # noqa: E402  (found only after use_torch_kernels)

# ---------------------------------------------------------------------------------------------
# Seeded sampling


def murmur3(seed: int, position: int, column: int) -> int:
    """MurmurHash3 x86_32 of four little-endian words, from its published description."""

    def rotl(x: int, r: int) -> int:
        return ((x << r) | (x >> (32 - r))) & U32

    h = 0
    for k in (seed & U32, (seed >> 32) & U32, position & U32, column & U32):
        k = rotl(k * 0xCC9E2D51 & U32, 15) * 0x1B873593 & U32
        h = (rotl(h ^ k, 13) * 5 + 0xE6546B64) & U32
    h ^= 16
    h = (h ^ (h >> 16)) * 0x85EBCA6B & U32
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & U32
    return h ^ (h >> 16)


def hash_of(seeds: list[int], positions: list[int], columns: list[int]) -> torch.Tensor:
    hashed: torch.Tensor = torch.ops.sgl_kernel.murmur_hash32_cpu.default(
        torch.tensor(seeds, dtype=torch.uint64),
        torch.tensor(positions, dtype=torch.int64),
        torch.tensor(columns, dtype=torch.int64),
    )
    return hashed


@pytest.mark.parametrize(
    ("seed", "position", "column", "hashed"),
    # Values that SGLang's own CPU test expects of the compiled kernel.
    [
        (0, 0, 0, 2167721464),
        (1, 7, 1, 4196701286),
        (42, 123, 2, 2740678348),
        (0x123456789ABCDEF0, 456, 17, 3372550890),
    ],
)
def test_murmur_hash_of_known_values(seed: int, position: int, column: int, hashed: int) -> None:
    assert murmur3(seed, position, column) == hashed
    assert hash_of([seed], [position], [column]).item() == hashed


@settings(deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 2**64 - 1), st.integers(-(2**40), 2**40)), min_size=1, max_size=5
    ),
    columns=st.lists(st.integers(0, 2**33), min_size=1, max_size=7),
)
def test_murmur_hash_equals_the_integer_reference(
    rows: list[tuple[int, int]], columns: list[int]
) -> None:
    seeds, positions = [r[0] for r in rows], [r[1] for r in rows]
    hashed = hash_of(seeds, positions, columns)
    assert hashed.dtype == torch.uint32
    assert hashed.tolist() == [[murmur3(s, p, c) for c in columns] for s, p in rows]


def test_murmur_hash_takes_uint64_positions_and_leaves_its_arguments_alone() -> None:
    seeds = torch.tensor([2**64 - 1, 3], dtype=torch.uint64)
    positions = torch.tensor([9, 2**32 - 1], dtype=torch.uint64)
    columns = torch.tensor([0, 150_000])
    before = [seeds.tolist(), positions.tolist(), columns.tolist()]
    hashed = torch.ops.sgl_kernel.murmur_hash32_cpu.default(seeds, positions, columns)
    expected = [[murmur3(s, p, c) for c in before[2]] for s, p in zip(*before[:2], strict=True)]
    assert hashed.tolist() == expected
    assert [seeds.tolist(), positions.tolist(), columns.tolist()] == before


def test_murmur_hash_can_be_traced_by_torch_compile() -> None:
    # SGLang calls it inside @torch.compile; the eager backend needs no C++ compiler here.
    compiled = torch.compile(
        lambda s, p, c: torch.ops.sgl_kernel.murmur_hash32_cpu.default(s, p, c),
        backend="aot_eager",
        dynamic=True,
        fullgraph=True,
    )
    for rows, width in ((2, 3), (5, 4)):
        seeds = torch.arange(rows, dtype=torch.int64).to(torch.uint64)
        hashed = compiled(seeds, torch.arange(rows), torch.arange(width))
        assert hashed.tolist() == [[murmur3(r, r, c) for c in range(width)] for r in range(rows)]


def test_murmur_hash_is_uniform_enough_to_sample_from() -> None:
    # Mean of 65536 uniform numbers: standard deviation 0.0011, so 6 of them; false alarm 2e-9.
    uniform = hash_of(list(range(64)), [5] * 64, list(range(1024))).to(torch.float64) / U32
    assert abs(uniform.mean().item() - 0.5) < 0.0068


@torch.no_grad()
def test_a_seeded_row_draws_the_token_of_its_seed_position_and_temperature() -> None:
    """SGLang's Sampler as --enable-deterministic-inference makes it, with our hooks around it.

    The token is the best of logits / tau + Gumbel noise, hashed from seed, position and token id;
    also in another batch. No server starts in this mode on a CPU.
    """
    from sglang.srt.layers.sampler import Sampler

    from ead_sampler import parse_annealing
    from ead_sampler.in_scheduler import sampling
    from ead_sampler.in_scheduler.rows import AnnealedRows, RowRequest
    from ead_sampler.selftest import sampling_info, standalone_sampler

    vocabulary, prompt = 200, 3
    logits = 3 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(0))
    linear = {"schedule": "linear", "length": 40.0, "tau_max": 2.0, "tau_min": 0.2}
    rows = [  # seed, position of the last token, tau of the next: at t = position - 2
        *(
            (seed, position, 2.0 - 1.8 * (position - 2) / 40)
            for seed in (1, 7)
            for position in (5, 22)
        ),
        *((seed, 22, None) for seed in (1, 7)),
    ]
    rows = [(seed + group, *rest) for group in range(10) for seed, *rest in rows]

    def noise(seed: int, position: int, token: int) -> float:
        uniform = murmur3(seed, position, token) / U32
        return -math.log(-math.log(min(max(uniform, 1e-300), 1 - 2**-32)))

    def draw(batch: list[Any]) -> tuple[list[int], torch.Tensor]:
        asked = [
            RowRequest(prompt, parse_annealing(linear) if tau is not None else None)
            for _, _, tau in batch
        ]
        seeds = torch.tensor([seed for seed, _, _ in batch])
        info = replace(sampling_info(len(batch), vocabulary, "cpu", 0.7), sampling_seed=seeds)
        setattr(info, sampling.ROWS, AnnealedRows.build(asked, "cpu"))
        output = SimpleNamespace(
            next_token_logits=logits.repeat(len(batch), 1), auxiliary_device_output=None
        )
        sampling.keep_model_logprobs(None, output, info)
        positions = torch.tensor([position for _, position, _ in batch])
        nothing: tuple[Any, ...] = (False, [0] * len(batch), [[]] * len(batch))
        with torch.compiler.set_stance("force_eager"):
            tokens = sampling.sample(Sampler.forward, sampler, output, info, *nothing, positions)
        return tokens.tolist(), output.auxiliary_device_output.values

    sampler = standalone_sampler("cpu", enable_deterministic_inference=True)
    tokens, values = draw(rows)
    for (seed, position, tau), token, (at, logprob, *_) in zip(rows, tokens, values, strict=True):
        tau = 0.7 if tau is None else tau
        scores = [logits[i].item() / tau + noise(seed, position, i) for i in range(vocabulary)]
        assert token == scores.index(max(scores))
        assert at.item() == pytest.approx(tau, rel=1e-6)
        want = (logits.double() / tau).log_softmax(-1)[token].item()
        assert logprob.item() == pytest.approx(want, abs=1e-5)
    assert len(set(tokens)) > 5
    assert draw(rows[7:20])[0] == tokens[7:20]


# ---------------------------------------------------------------------------------------------
# Slots of the KV cache


@st.composite
def segments(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], int]:
    """Rows (distinct), starts and ends of a batch, and the length of a row."""
    pool_len = draw(st.integers(1, 12))
    rows = draw(st.lists(st.integers(0, 6), unique=True, max_size=5))
    starts = [draw(st.integers(0, pool_len)) for _ in rows]
    ends = [draw(st.integers(start, pool_len)) for start in starts]
    return rows, starts, ends, pool_len


@INT32_AND_INT64
@settings(deadline=None)
@given(batch=segments(), spare=st.integers(0, 3))
def test_new_slots_are_written_to_the_cells_of_each_request(
    dtype: torch.dtype, batch: tuple[list[int], list[int], list[int], int], spare: int
) -> None:
    rows, starts, ends, pool_len = batch
    table = torch.arange(7 * pool_len, dtype=torch.int32).view(7, pool_len)
    needed = sum(ends) - sum(starts)
    slots = torch.arange(1000, 1000 + needed + spare)
    expected = table.tolist()
    following = iter(slots.tolist())
    for row, start, end in zip(rows, starts, ends, strict=True):
        for column in range(start, end):
            expected[row][column] = next(following)
    sgl_kernel.assign_req_to_token_pool_cpu(
        torch.tensor(rows, dtype=torch.int64),
        table,
        torch.tensor(starts, dtype=dtype),
        torch.tensor(ends, dtype=dtype),
        slots,
        pool_len,
    )
    assert table.tolist() == expected


@INT32_AND_INT64
@settings(deadline=None)
@given(batch=segments(), spare=st.integers(0, 3))
def test_slots_are_read_back_in_request_order_and_the_tail_is_left_alone(
    dtype: torch.dtype, batch: tuple[list[int], list[int], list[int], int], spare: int
) -> None:
    rows, starts, ends, pool_len = batch
    table = torch.arange(7 * pool_len, dtype=torch.int32).view(7, pool_len)
    expected = [
        row * pool_len + column
        for row, start, end in zip(rows, starts, ends, strict=True)
        for column in range(start, end)
    ]
    out = torch.full((len(expected) + spare,), -7, dtype=torch.int64)
    sgl_kernel.assign_extend_cache_locs_cpu(
        torch.tensor(rows, dtype=torch.int64),
        table,
        torch.tensor(starts, dtype=dtype),
        torch.tensor(ends, dtype=dtype),
        out,
        pool_len,
    )
    assert out.tolist() == expected + [-7] * spare


def test_draft_slots_follow_each_sequence() -> None:
    table = torch.arange(40, dtype=torch.int32).view(4, 10)
    out = torch.zeros(2 * 2 * 3, dtype=torch.int64)
    sgl_kernel.assign_draft_cache_locs_contiguous_cpu(
        torch.tensor([3, 1]), table, torch.tensor([0, 4]), out, 10, 2, 3
    )
    assert out.tolist() == [30, 31, 32, 33, 34, 35, 14, 15, 16, 17, 18, 19]


@INT32_AND_INT64
@given(
    accept=st.lists(st.integers(-1, 9), min_size=2, max_size=12).filter(lambda a: not len(a) % 2)
)
def test_accepted_slots_are_packed_in_front(dtype: torch.dtype, accept: list[int]) -> None:
    slots = torch.arange(100, 110)
    out = torch.full((len(accept),), -7, dtype=torch.int64)
    sgl_kernel.fill_accept_out_cache_loc_cpu(
        torch.tensor(accept, dtype=dtype).view(-1, 2), slots, out
    )
    expected = [100 + index for index in accept if index != -1]
    assert out.tolist() == expected + [-7] * (len(accept) - len(expected))


@settings(deadline=None)
@given(data=st.data())
def test_cache_slots_are_copied_in_every_buffer_even_when_they_overlap(data: st.DataObject) -> None:
    slots = 8
    targets = data.draw(st.lists(st.integers(0, slots - 1), unique=True, max_size=slots))
    sources = [data.draw(st.integers(0, slots - 1)) for _ in targets]
    # Two layers of different dtype and slot size, as keys and values may have.
    buffers = [
        torch.randn(slots, 2, 3),
        torch.randn(slots, 5).to(torch.bfloat16),
    ]
    expected = [buffer.clone() for buffer in buffers]
    for wanted, buffer in zip(expected, buffers, strict=True):
        for target, source in zip(targets, sources, strict=True):
            wanted[target] = buffer[source]
    sgl_kernel.copy_all_layer_kv_cache_cpu(
        torch.tensor([b.data_ptr() for b in buffers], dtype=torch.uint64),
        torch.tensor([b.stride(0) * b.dtype.itemsize for b in buffers]),
        torch.tensor(targets, dtype=torch.int64),
        torch.tensor(sources, dtype=torch.int64),
    )
    assert all(torch.equal(b, e) for b, e in zip(buffers, expected, strict=True))


# ---------------------------------------------------------------------------------------------
# Speculative decoding


@st.composite
def trees(draw: st.DrawFn, nodes: int = 6, strays: bool = False) -> list[int]:
    """The parent of each node; a parent has a smaller number, node 0 has none (-1).

    With strays, other nodes may lack a parent too, as NGRAM's unused nodes do.
    """
    lowest = -1 if strays else 0
    return [-1, *(draw(st.integers(lowest, node - 1)) for node in range(1, nodes))]


def path_to_root(parents: list[int], node: int) -> list[int]:
    path = [node]
    while parents[path[-1]] != -1:
        path.append(parents[path[-1]])
    return path


def visible_nodes(parents: list[int]) -> list[list[bool]]:
    n = len(parents)
    return [[other in path_to_root(parents, node) for other in range(n)] for node in range(n)]


def links(parents: list[int]) -> tuple[list[int], list[int]]:
    """First child and next sibling of every node."""
    n = len(parents)
    children = [[c for c in range(n) if parents[c] == node] for node in range(n)]
    first_child = [c[0] if c else -1 for c in children]
    next_sibling = [-1] * n
    for family in children:
        for elder, younger in itertools.pairwise(family):
            next_sibling[elder] = younger
    return first_child, next_sibling


@settings(deadline=None)
@given(batch=st.lists(trees(strays=True), min_size=1, max_size=3), data=st.data())
def test_tree_links_are_recovered_from_the_mask(
    batch: list[list[int]], data: st.DataObject
) -> None:
    bs, n = len(batch), len(batch[0])
    seq_lens = [data.draw(st.integers(0, 50)) for _ in batch]
    mask = torch.tensor([visible_nodes(parents) for parents in batch])
    positions = torch.zeros(bs * n, dtype=torch.int64)
    index, child, sibling = (torch.full((bs, n), 77, dtype=torch.int64) for _ in range(3))
    sgl_kernel.speculative.reconstruct_indices_from_tree_mask(
        mask.flatten(), torch.tensor(seq_lens), positions, index, child, sibling, bs, n
    )
    depths = [[len(path_to_root(p, node)) - 1 for node in range(n)] for p in batch]
    expected = [[seq + d for d in row] for seq, row in zip(seq_lens, depths, strict=True)]
    assert positions.view(bs, n).tolist() == expected
    assert index.flatten().tolist() == list(range(bs * n))
    assert child.tolist() == [links(parents)[0] for parents in batch]
    assert sibling.tolist() == [links(parents)[1] for parents in batch]


def as_eagle_candidates(parents: list[int], topk: int) -> tuple[list[int], list[int]]:
    """EAGLE's `selected_index` and `parent_list` of a tree with at most topk children per node.

    Candidate c hangs from parent c // topk; parent 0 is node 0, and the others are numbered in the
    order of their nodes.
    """
    order = sorted({p for p in parents if p > 0})
    number = {0: 0} | {node: i for i, node in enumerate(order, start=1)}
    used = dict.fromkeys(number, 0)
    selected = []
    for parent in parents[1:]:
        selected.append(number[parent] * topk + used[parent])
        used[parent] += 1
    return selected, [-1, *(selected[node - 1] for node in order)]


@pytest.mark.parametrize("full_mask", [False, True])
@settings(deadline=None)
@given(batch=st.lists(trees(), min_size=1, max_size=3), data=st.data())
def test_eagle_candidates_become_the_tree_they_describe(
    full_mask: bool, batch: list[list[int]], data: st.DataObject
) -> None:
    bs, n, topk, depth = len(batch), len(batch[0]), len(batch[0]), len(batch[0])
    seq_lens = [data.draw(st.integers(0, 9)) for _ in batch]
    described = [as_eagle_candidates(parents, topk) for parents in batch]
    width = topk * (depth - 1) + 1
    parent_list = [pair[1] + [-1] * (width - len(pair[1])) for pair in described]
    prefix = [seq if full_mask else 0 for seq in seq_lens]
    mask = torch.ones(sum(n * (p + n) for p in prefix), dtype=torch.bool)
    positions = torch.zeros(bs * n, dtype=torch.int64)
    index, child, sibling = (torch.full((bs, n), -1, dtype=torch.int64) for _ in range(3))
    sgl_kernel.build_tree_kernel_efficient_cpu(
        torch.tensor(parent_list),
        torch.tensor([pair[0] for pair in described]),
        torch.tensor(seq_lens),
        mask,
        positions,
        index,
        child,
        sibling,
        topk,
        depth,
        n,
        0 if full_mask else 1,
    )
    expected_mask = [
        cell
        for parents, p in zip(batch, prefix, strict=True)
        for row in visible_nodes(parents)
        for cell in [True] * p + row
    ]
    assert mask.tolist() == expected_mask
    depths = [len(path_to_root(p, node)) - 1 for p in batch for node in range(n)]
    starts = [seq for seq in seq_lens for _ in range(n)]
    assert positions.tolist() == [s + d for s, d in zip(starts, depths, strict=True)]
    assert index.flatten().tolist() == list(range(bs * n))
    assert child.tolist() == [links(parents)[0] for parents in batch]
    assert sibling.tolist() == [links(parents)[1] for parents in batch]


def test_a_tree_of_one_step_has_no_parent_list() -> None:
    mask = torch.ones(9, dtype=torch.bool)
    positions = torch.zeros(3, dtype=torch.int64)
    index, child, sibling = (torch.full((1, 3), -1, dtype=torch.int64) for _ in range(3))
    sgl_kernel.build_tree_kernel_efficient_cpu(
        torch.empty(1, 0, dtype=torch.int64),
        torch.tensor([[0, 1]]),
        torch.tensor([7]),
        mask,
        positions,
        index,
        child,
        sibling,
        2,
        1,
        3,
        1,
    )
    assert mask.view(3, 3).tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    assert positions.tolist() == [7, 8, 8]
    assert (child.tolist(), sibling.tolist()) == ([[1, -1, -1]], [[-1, 2, -1]])


def test_the_packed_mask_is_refused() -> None:
    empty = torch.empty(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="tree_mask_mode"):
        sgl_kernel.build_tree_kernel_efficient_cpu(*[empty] * 8, 1, 1, 1, 2)


def accepted_by_hand(
    parents: list[int], draft: list[int], target: list[int], limit: int
) -> list[int]:
    """Nodes accepted from node 0 down: at each, the first child that holds the target's choice."""
    accepted = [0]
    while len(accepted) < limit:
        children = [c for c in range(len(parents)) if parents[c] == accepted[-1]]
        matching = [c for c in children if draft[c] == target[accepted[-1]]]
        if not matching:
            break
        accepted.append(matching[0])
    return accepted


@settings(deadline=None, max_examples=200)
@given(batch=st.lists(trees(), min_size=1, max_size=3), limit=st.integers(1, 6), data=st.data())
def test_the_target_accepts_the_path_it_would_have_chosen(
    batch: list[list[int]], limit: int, data: st.DataObject
) -> None:
    bs, n = len(batch), len(batch[0])
    token = st.integers(0, 2)  # few tokens, so that long paths are accepted often
    draft = [[data.draw(token) for _ in range(n)] for _ in batch]
    target = [[data.draw(token) for _ in range(n)] for _ in batch]
    predicts = torch.full((bs * n,), -5, dtype=torch.int32)
    accept_index = torch.full((bs, limit), -1, dtype=torch.int32)
    accepted_drafts = torch.full((bs,), -5, dtype=torch.int32)
    sgl_kernel.verify_tree_greedy_cpu(
        predicts=predicts,
        accept_index=accept_index,
        accept_token_num=accepted_drafts,
        candidates=torch.tensor(draft),
        retrive_index=torch.arange(bs * n).view(bs, n),
        retrive_next_token=torch.tensor([links(parents)[0] for parents in batch]),
        retrive_next_sibling=torch.tensor([links(parents)[1] for parents in batch]),
        target_predict=torch.tensor(target),
    )
    expected_predicts = [-5] * (bs * n)
    for request, parents in enumerate(batch):
        accepted = accepted_by_hand(parents, draft[request], target[request], limit)
        flat = [request * n + node for node in accepted]
        assert accept_index[request].tolist() == flat + [-1] * (limit - len(flat))
        assert accepted_drafts[request].item() == len(accepted) - 1
        for node in accepted:
            expected_predicts[request * n + node] = target[request][node]
    assert predicts.tolist() == expected_predicts


def test_greedy_verification_of_a_tree_by_hand() -> None:
    #        0            The target says 5 after node 0, 8 after node 2, 9 after node 4:
    #      1   2          drafts 2 and 4 are accepted, and 9 is the bonus token.
    #    3       4
    accept_index = torch.full((1, 4), -1, dtype=torch.int32)
    predicts = torch.zeros(5, dtype=torch.int32)
    accepted_drafts = torch.zeros(1, dtype=torch.int32)
    sgl_kernel.verify_tree_greedy_cpu(
        predicts,
        accept_index,
        accepted_drafts,
        torch.tensor([[1, 4, 5, 8, 8]]),
        torch.arange(5).view(1, 5),
        torch.tensor([[1, 3, 4, -1, -1]]),
        torch.tensor([[-1, 2, -1, -1, -1]]),
        torch.tensor([[5, 8, 8, 0, 9]]),
    )
    assert accept_index.tolist() == [[0, 2, 4, -1]]
    assert predicts.tolist() == [5, 0, 8, 0, 9]
    assert accepted_drafts.tolist() == [2]


def test_the_bonus_token_is_the_last_accepted_one() -> None:
    tokens = torch.tensor([[10, 11, 12], [20, 21, 22], [30, 31, 32]], dtype=torch.int32)
    for accept_tokens in (tokens, tokens.flatten()):
        bonus = torch.zeros(3, dtype=torch.int32)
        lengths = torch.tensor([1, 3, 2], dtype=torch.int32)
        sgl_kernel.fill_bonus_tokens_cpu(accept_tokens, lengths, bonus, 3)
        assert bonus.tolist() == [10, 22, 31]


@given(lengths=st.lists(st.integers(0, 4), max_size=5), selects=st.booleans(), data=st.data())
def test_each_segment_moves_left_and_takes_its_new_token(
    lengths: list[int], selects: bool, data: st.DataObject
) -> None:
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    before = list(range(sum(lengths)))
    places = [
        start + (data.draw(st.integers(0, n - 1)) if selects and n else n - 1)
        for start, n in zip(starts, lengths, strict=True)
    ]
    expected = before.copy()
    for i, (start, n) in enumerate(zip(starts, lengths, strict=True)):
        for offset in range(n - 1):
            expected[start + offset] = before[start + offset + 1]
        if n:
            expected[places[i]] = 500 + i
    ids = torch.tensor(before, dtype=torch.int64)
    sgl_kernel.rotate_input_ids_cpu(
        ids,
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(lengths, dtype=torch.int64),
        torch.arange(500, 500 + len(lengths)).view(-1, 1),
        torch.tensor(places, dtype=torch.int64) if selects else None,
    )
    assert ids.tolist() == expected


# ---------------------------------------------------------------------------------------------
# What is found on the search path


def python(code: str, **environment: str) -> str:
    """Output of a fresh interpreter, started with nothing of ours on its search path but ROOT."""
    entries = [*environment.pop("PYTHONPATH", "").split(os.pathsep), str(ROOT)]
    env = os.environ | environment | {"PYTHONPATH": os.pathsep.join(filter(None, entries))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_compiled_package_is_reported_and_a_broken_one_leaves_nothing_behind(
    tmp_path: Path,
) -> None:
    package = tmp_path / "sgl_kernel"
    package.mkdir()
    (package / "part.py").write_text("")
    ask = (
        "import sys; from ead_sampler.cpu_kernels import compiled_kernels_available as a;"
        "print(a(), a(), any('sgl_kernel' in m for m in sys.modules))"
    )
    (package / "__init__.py").write_text("import sgl_kernel.part; raise ImportError('libcuda')")
    assert python(ask, PYTHONPATH=str(tmp_path)) == "False False False"
    (package / "__init__.py").write_text("import sgl_kernel.part")
    assert python(ask, PYTHONPATH=str(tmp_path)) == "True True True"


def test_our_own_package_does_not_count_as_compiled_and_is_found_by_children() -> None:
    code = """
import os, subprocess, sys
from ead_sampler.cpu_kernels import compiled_kernels_available, use_torch_kernels
use_torch_kernels()
once = (sys.path.copy(), os.environ["PYTHONPATH"])
use_torch_kernels()
assert (sys.path, os.environ["PYTHONPATH"]) == once
assert not compiled_kernels_available()
import sgl_kernel
assert not compiled_kernels_available()
child = "import sgl_kernel; print(sgl_kernel.__file__)"
found = subprocess.check_output([sys.executable, "-c", child], text=True).strip()
print(found == sgl_kernel.__file__)
"""
    assert python(code) == "True"


def test_names_that_only_a_compiled_package_has_are_import_errors() -> None:
    with pytest.raises(ImportError):
        from sgl_kernel import silu_and_mul  # noqa: F401
    with pytest.raises(ImportError):
        import sgl_kernel.flash_attn  # noqa: F401
    assert not hasattr(torch.ops.sgl_kernel, "convert_weight_packed")  # SGLang's test for AMX


def test_torchvision_imports_here_and_in_children() -> None:
    pytest.importorskip("torchvision")
    code = """
import subprocess, sys
from ead_sampler.cpu_kernels import use_torch_kernels
use_torch_kernels()
child = "import torchvision, torchvision.transforms; print(torchvision.__version__)"
subprocess.run([sys.executable, "-c", child], check=True)
import torchvision
assert "ead_sampler" not in torchvision.__file__, torchvision.__file__
"""
    python(code)


def test_a_missing_torchvision_is_still_missing() -> None:
    shim = ROOT / "ead_sampler" / "cpu_kernels" / "torchvision_schemas"
    code = f"""
import sys, torch
sys.path[:] = [{str(shim)!r}]
try:
    import torchvision
except ModuleNotFoundError as error:
    print(error.name)
"""
    assert python(code) == "torchvision"
