"""linear_logprobs against log_softmax over whole logits and plain autograd, in float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trainer_bridge.algorithms import logprobs as module
from trainer_bridge.algorithms.logprobs import TokenLogprobs, VocabShard, linear_logprobs

HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 2.0},
    "scale": {"scale": 0.25},
    "all": {"bias": True, "softcap": 2.0, "scale": 0.25},
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_TILE", (3, 5))


class Case:
    """Random inputs and upstream gradients; what ours and the naive way make of them."""

    def __init__(
        self,
        n: int,
        v: int,
        h: int = 4,
        *,
        dtype: torch.dtype = torch.float64,
        temperatures: bool = True,
        bias: bool = False,
        seed: int = 0,
        device: str = "cpu",
        **transform: Any,
    ) -> None:
        def numbers(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

        generator = torch.Generator().manual_seed(seed)
        self.inputs = {"hidden": numbers(n, h), "weight": numbers(v, h)}
        if bias:
            self.inputs["bias"] = numbers(v)
        self.inputs = {k: x.to(dtype).requires_grad_() for k, x in self.inputs.items()}
        self.exact = {k: x.detach().double().requires_grad_() for k, x in self.inputs.items()}
        self.targets = torch.randint(0, v, (n,), generator=generator).to(device)
        self.temperatures = 10 ** numbers(n).clamp(-1, 1) if temperatures else None
        self.upstream = numbers(3, n)
        self.transform = transform

    def ours(self) -> TokenLogprobs:
        return linear_logprobs(
            **self.inputs, targets=self.targets, temperatures=self.temperatures, **self.transform
        )

    def naive(self) -> TokenLogprobs:
        """In float64, of the same inputs."""
        return naive(
            **self.exact,
            targets=self.targets,
            temperatures=self.temperatures,
            **self.transform,
        )

    def gradients(
        self, results: TokenLogprobs, inputs: dict[str, Tensor], of: str = ""
    ) -> dict[str, Tensor]:
        """Of the results, all or one, weighted by `upstream`."""
        pairs = zip(results._fields, results, self.upstream, strict=True)
        loss = sum((up.to(r) * r).sum() for name, r, up in pairs if of in ("", name))
        return dict(zip(inputs, torch.autograd.grad(loss, [*inputs.values()]), strict=True))


def naive(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperatures: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> TokenLogprobs:
    z = hidden @ weight.T
    if bias is not None:
        z = z + bias
    z = z * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    tau = torch.ones_like(z[:, 0]) if temperatures is None else temperatures
    log_p, log_p_tau = z.log_softmax(-1), (z / tau[:, None]).log_softmax(-1)
    at_target = [one.gather(1, targets[:, None])[:, 0] for one in (log_p, log_p_tau)]
    return TokenLogprobs(*at_target, -(log_p.exp() * log_p).sum(-1))


def check(case: Case, tolerance: float, gradient_tolerance: float, absolute: float = 1e-5) -> None:
    """absolute: of a gradient, by its largest element's size."""
    ours, wanted = case.ours(), case.naive()
    for name, got, want in zip(ours._fields, ours, wanted, strict=True):
        torch.testing.assert_close(
            got.double(), want, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    got_all, want_all = case.gradients(ours, case.inputs), case.gradients(wanted, case.exact)
    for name, want in want_all.items():
        got = got_all[name]
        assert got.dtype == case.inputs[name].dtype
        size = want.abs().max().item() if want.numel() else 0.0
        torch.testing.assert_close(
            got.double(),
            want,
            rtol=gradient_tolerance,
            atol=min(gradient_tolerance, absolute) * size,
            msg=lambda m, n=name: f"gradient of {n}: {m}",
        )


# --- values and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("temperatures", [True, False])
@pytest.mark.parametrize("head", HEADS)
def test_gradients_are_those_of_finite_differences(head: str, temperatures: bool) -> None:
    case = Case(4, 7, temperatures=temperatures, **HEADS[head])

    def results(*inputs: Tensor) -> TokenLogprobs:
        named = dict(zip(case.inputs, inputs, strict=True))
        return linear_logprobs(
            **named, targets=case.targets, temperatures=case.temperatures, **case.transform
        )

    assert torch.autograd.gradcheck(results, tuple(case.inputs.values()))


# Of values and gradients. Of half precisions the inputs are what is rounded, and at the very end
# the gradients.
TOLERANCES = {
    torch.float64: (1e-12, 1e-11),
    torch.float32: (2e-6, 1e-5),
    torch.bfloat16: (2e-6, 2**-8),
    torch.float16: (2e-6, 2**-11),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_values_and_gradients_equal_log_softmax_over_whole_logits(
    dtype: torch.dtype, head: str
) -> None:
    check(Case(10, 23, dtype=dtype, **HEADS[head]), *TOLERANCES[dtype])


def test_they_do_with_tiles_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    n, v = (side + 77 for side in module.CPU_TILE)
    check(Case(n, v, dtype=torch.float32), 1e-5, 1e-5)


@given(
    n=st.integers(0, 8),
    v=st.integers(1, 12),
    h=st.integers(1, 5),
    temperatures=st.booleans(),
    head=st.sampled_from(list(HEADS)),
    seed=st.integers(0, 2**16),
)
def test_any_shape_gives_what_whole_logits_give(
    n: int, v: int, h: int, temperatures: bool, head: str, seed: int
) -> None:
    check(Case(n, v, h, temperatures=temperatures, seed=seed, **HEADS[head]), 1e-11, 1e-9)


def test_no_tokens_give_empty_results_and_zero_gradients() -> None:
    case = Case(0, 7, bias=True)
    results = case.ours()
    assert [list(r.shape) for r in results] == [[0]] * 3
    gradients = case.gradients(results, case.inputs)
    assert not gradients["weight"].any()
    assert not gradients["bias"].any()
    assert gradients["hidden"].shape == (0, 4)


@pytest.mark.parametrize("target", [0, 4, 5, 9, 10, 11])  # tiles are 0-4, 5-9 and 10-11
def test_a_target_at_any_tiles_edge_is_found(target: int) -> None:
    case = Case(1, 12)
    case.targets = torch.tensor([target])
    check(case, 1e-12, 1e-11)


@pytest.mark.parametrize("tau", [0.01, 1.0, 10.0])
@pytest.mark.parametrize("spread", [1e4, 1e2, 1e-4])
def test_extreme_logits_and_temperatures_stay_exact(spread: float, tau: float) -> None:
    """The first token's target is the likeliest of all, the last one's the least likely."""
    v = 12
    logits = torch.linspace(-1, 1, v).mul(spread).repeat(v, 1)
    weight = logits[:1].T.clone().requires_grad_()  # [V, 1]: the logits are the weights
    hidden = torch.ones(v, 1, requires_grad=True)
    targets = torch.arange(v).flip(0)
    temperatures = torch.full((v,), tau)
    got = linear_logprobs(hidden, weight, targets, temperatures=temperatures)
    want = naive(hidden.double(), weight.double(), targets, temperatures.double())
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=1e-6)
        assert torch.isfinite(one).all()
    assert (got.logprobs <= 0).all()
    assert (got.tempered <= 0).all()
    assert (got.entropies >= 0).all()
    for one, other in zip(got, want, strict=True):
        ours, theirs = (
            torch.autograd.grad(result.sum(), weight, retain_graph=True)[0]
            for result in (one, other)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 / tau)


@pytest.mark.parametrize("of", TokenLogprobs._fields)
def test_each_result_alone_has_its_own_gradient(of: str) -> None:
    case = Case(7, 11, bias=True)
    ours = case.gradients(case.ours(), case.inputs, of)
    wanted = case.gradients(case.naive(), case.exact, of)
    for name in case.inputs:
        torch.testing.assert_close(ours[name], wanted[name], rtol=1e-10, atol=1e-10)


def test_a_retained_graph_gives_the_same_gradients_again() -> None:
    case = Case(10, 23, bias=True, softcap=2.0)  # 20 tiles, one of which is kept
    loss = torch.stack([*case.ours()]).sum()
    inputs = [*case.inputs.values()]
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), first, rtol=0, atol=0)


def test_without_temperatures_tempered_is_logprobs_and_trains_the_same() -> None:
    case = Case(7, 11, temperatures=False)
    results = case.ours()
    assert results.tempered is results.logprobs
    check(case, 1e-12, 1e-11)


def test_a_tied_head_adds_its_gradient_to_the_embeddings() -> None:
    torch.manual_seed(0)
    ids, targets = torch.randint(0, 11, (2, 7))
    gradients = []
    for function in (linear_logprobs, naive):
        embedding = torch.nn.Embedding(11, 4, dtype=torch.float64)
        torch.nn.init.normal_(embedding.weight, generator=torch.Generator().manual_seed(1))
        head = torch.nn.Linear(4, 11, bias=False)
        head.weight = embedding.weight
        function(embedding(ids).tanh(), head.weight, targets).logprobs.sum().backward()
        gradients.append(embedding.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


# --- transformers' heads -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "setting", "ours"),
    [
        ("Gemma2", {"final_logit_softcapping": 1.5}, {"softcap": 1.5}),
        ("Cohere", {"logit_scale": 0.25}, {"scale": 0.25}),
        ("Granite", {"logits_scaling": 4.0}, {"scale": 1 / 4.0}),
    ],
)
def test_softcap_and_scale_are_what_transformers_models_compute(
    family: str, setting: dict[str, float], ours: dict[str, float]
) -> None:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **setting,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    ids = torch.randint(3, 64, (1, 9))
    with torch.no_grad():
        want = model(ids[:, :-1]).logits[0].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        hidden = model.get_decoder()(ids[:, :-1]).last_hidden_state[0]
        got = linear_logprobs(hidden, model.get_output_embeddings().weight, ids[0, 1:], **ours)
        plain = linear_logprobs(hidden, model.get_output_embeddings().weight, ids[0, 1:])
    torch.testing.assert_close(got.logprobs, want, rtol=1e-5, atol=1e-5)
    assert (plain.logprobs - want).abs().max() > 1e-2  # the setting matters in this model


# --- what it costs -------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Counts operators and notes how many elements the largest tensor has that one returns."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, Tensor):
                self.largest = max(self.largest, one.numel())
        return result


@contextmanager
def recorded() -> Iterator[Recorder]:
    with Recorder() as recorder:
        yield recorder


@pytest.mark.parametrize("head", HEADS)
def test_no_tensor_of_all_tokens_and_the_whole_vocabulary_is_ever_made(
    head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CPU_TILE", (16, 64))
    n, v, h = 64, 256, 2
    case = Case(n, v, h, **HEADS[head])
    with recorded() as recorder:
        case.gradients(case.ours(), case.inputs)
    statistics = 5 * n * v // 64  # five numbers per token and tile of the vocabulary
    assert recorder.largest == max(16 * 64, v * h, n * h, statistics) < n * v / 8
    with recorded() as recorder:
        case.gradients(case.naive(), case.exact)
    assert recorder.largest == n * v  # the recorder does see such a tensor


def test_nothing_is_computed_that_nobody_needs() -> None:
    tiles = 4 * 5  # of 10 tokens and 23 vocabulary entries

    def products(of: str, frozen: str = "") -> int:
        calls = operators(of, frozen)
        return calls["mm"] + calls["addmm_"]

    def operators(of: str, frozen: str = "") -> Counter[str]:
        case = Case(10, 23, temperatures=of != "logprobs")
        if frozen:
            case.inputs[frozen].requires_grad_(False)
        result = getattr(case.ours(), of).sum()
        with recorded() as recorder:
            result.backward()
        return recorder.calls

    again = tiles - tiles // module.KEPT  # of so many tiles the logits are made again
    assert products("logprobs") == again + 2 * tiles  # and the two gradients
    assert products("logprobs", frozen="weight") == again + tiles
    assert products("logprobs", frozen="hidden") == again + tiles
    with torch.no_grad(), recorded() as recorder:
        Case(10, 23).ours()
    assert recorder.calls["clone"] == 0  # no tile is kept for a backward pass that never comes
    for of in TokenLogprobs._fields:  # one softmax, at the temperature that matters
        calls = operators(of)
        assert calls["exp"] + calls["exp_"] == tiles


# --- torch.compile, autocast ---------------------------------------------------------------------


@pytest.mark.parametrize("head", ["plain", "all"])
def test_compiled_into_one_graph_it_gives_the_same(head: str) -> None:
    torch._dynamo.reset()
    case = Case(7, 11, **HEADS[head])
    compiled = torch.compile(linear_logprobs, backend="aot_eager", fullgraph=True)
    results = compiled(
        **case.inputs, targets=case.targets, temperatures=case.temperatures, **case.transform
    )
    wanted = case.ours()
    for got, want in zip(results, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    got_all, want_all = (case.gradients(r, case.inputs) for r in (results, wanted))
    for name, want in want_all.items():
        torch.testing.assert_close(got_all[name], want, rtol=1e-12, atol=1e-12)


def test_autocast_does_not_round_the_logits() -> None:
    case = Case(7, 11, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        results = case.ours()
        gradients = case.gradients(results, case.inputs)
    wanted = case.ours()
    for got, want in zip(results, wanted, strict=True):
        assert torch.equal(got, want)
    for name, want in case.gradients(wanted, case.inputs).items():
        assert torch.equal(gradients[name], want)


# --- a sharded head ------------------------------------------------------------------------------

SHARDS = [0, 9, 17]  # two ranks: rows 0-8 and 9-16


def _rank(rank: int, folder: str) -> None:
    """One of two gloo processes: its results and gradients, written to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    module.CPU_TILE = (3, 5)
    rows = slice(*SHARDS[rank : rank + 2])
    found = {}
    for head, options in HEADS.items():
        case = Case(8, SHARDS[-1], **options)
        for name in set(case.inputs) - {"hidden"}:
            case.inputs[name] = case.inputs[name].detach()[rows].requires_grad_()
        case.transform["shard"] = VocabShard(rows.start, dist.group.WORLD)
        results = case.ours()
        found[head] = (tuple(r.detach() for r in results), case.gradients(results, case.inputs))
    case.targets[0] = SHARDS[-1]  # which no rank has
    found["outside"] = case.ours().logprobs.detach()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_a_head_sharded_over_two_processes_gives_what_the_whole_head_gives(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for head, options in HEADS.items():
        case = Case(8, SHARDS[-1], **options)
        wanted = case.naive()
        want_all = case.gradients(wanted, case.exact)
        for rank, found in enumerate(ranks):
            results, gradients = found[head]
            for got, want in zip(results, wanted, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
            rows = slice(*SHARDS[rank : rank + 2])
            for name, want in want_all.items():
                part = want if name == "hidden" else want[rows]
                torch.testing.assert_close(gradients[name], part, rtol=1e-11, atol=1e-11)
    for found in ranks:
        assert found["outside"].isnan().tolist() == [True] + [False] * 7


# --- what does not fit ---------------------------------------------------------------------------


def call(**changes: Any) -> TokenLogprobs:
    case = Case(3, 7, dtype=torch.float32, bias=True)
    arguments = {**case.inputs, "targets": case.targets, "temperatures": case.temperatures}
    return linear_logprobs(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.ones(2, 3, 4)}, r"hidden and weight must be .*float32 \[2, 3, 4\]"),
        ({"hidden": torch.ones(3, 4, dtype=torch.int64)}, "must be floating"),
        ({"weight": torch.ones(0, 4)}, "V >= 1"),
        ({"weight": torch.ones(7, 5)}, r"weight must be torch.float32 \[7, 4\], not .*\[7, 5\]"),
        ({"weight": torch.ones(7, 4).bfloat16()}, r"weight must be torch.float32.*bfloat16"),
        ({"bias": torch.ones(6)}, r"bias must be torch.float32 \[7\]"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, r"targets must be torch.int64 \[3\]"),
        ({"targets": torch.zeros(3)}, r"targets must be torch.int64"),
        ({"targets": torch.tensor([0, 7, 1])}, r"targets must be in \[0, 7\), not 7"),
        ({"targets": torch.tensor([0, -100, 1])}, r"targets must be in \[0, 7\), not -100"),
        ({"temperatures": torch.ones(3, 1)}, r"temperatures must be .*\[3\], not .*\[3, 1\]"),
        ({"temperatures": torch.tensor([1.0, 0.0, 1.0])}, "positive and finite, not 0.0"),
        ({"temperatures": torch.tensor([1.0, -1.0, 1.0])}, "positive and finite, not -1.0"),
        ({"temperatures": torch.tensor([1.0, 1.0, torch.nan])}, "positive and finite, not nan"),
        ({"temperatures": torch.tensor([torch.inf, 1.0, 1.0])}, "positive and finite, not inf"),
        ({"softcap": 0.0}, "softcap must be positive and finite, not 0.0"),
        ({"scale": float("nan")}, "scale must be positive and finite, not nan"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize(
    ("changes", "spoiled"),
    [
        ({"targets": torch.tensor([0, 7, 1])}, ("logprobs", "tempered")),
        ({"targets": torch.tensor([0, -1, 1])}, ("logprobs", "tempered")),
        ({"temperatures": torch.tensor([1.0, 0.0, 1.0])}, ("tempered",)),
        ({"temperatures": torch.tensor([1.0, -1.0, 1.0])}, ("tempered",)),
    ],
)
def test_what_could_not_be_looked_at_gives_nan_for_that_token_alone(
    changes: dict[str, Any], spoiled: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, or within a compiled graph."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for name, result in call(**changes)._asdict().items():
        assert result.isnan().tolist() == [False, name in spoiled, False]


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_gives_what_float64_gives_and_is_not_waited_for(
    dtype: torch.dtype, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GPU_TILE", (16, 32))
    case = Case(40, 72, 16, dtype=dtype, device="cuda", **HEADS[head])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.gradients(case.ours(), case.inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    relative = max(1e-4, 4 * TOLERANCES[dtype][1])  # the tiles' gradients are rounded as well
    check(case, 1e-5, relative, absolute=relative)
