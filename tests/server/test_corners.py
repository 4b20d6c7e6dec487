"""Corners of SGLang in which a schedule must be exact, or is refused with the reason."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import xgrammar
from helpers.answers import gaps
from helpers.kinds_served import WITH_STATE, check_all_kinds
from helpers.reference import TINY_FLAGS, Reference
from helpers.serving import (
    FAST,
    LOGPROB_TOLERANCE,
    check_against_reference,
    expected_temperatures,
    post,
)
from helpers.weight_tensors import config, named_tensors, perturbed
from safetensors.torch import save_file
from scipy import stats

from ead_client import Client, Rollout
from ead_server.launch.process import ServerProcess
from trainer_bridge import weight_publisher
from trainer_bridge.errors import WeightUpdateFailed

PROMPT = [5, 6, 7]


def generate(server: ServerProcess, ids: list[int], count: int, **fields: Any) -> dict[str, Any]:
    """An annealed /generate answer of `count` tokens."""
    schedule = fields.pop("annealing", FAST)
    top = {key: fields.pop(key) for key in ("return_logprob", "logprob_start_len") if key in fields}
    params = {"max_new_tokens": count, "ignore_eos": True, "annealing": schedule, **fields}
    return post(server, "/generate", {"input_ids": ids, "sampling_params": params, **top})


def rollout_of(prompt: list[int], answer: dict[str, Any]) -> Rollout:
    meta = answer["meta_info"]
    names = ("temperatures", "logprobs", "model_logprobs")
    return Rollout(
        prompt_token_ids=prompt,
        token_ids=answer["output_ids"],
        **{name: meta[name] for name in names},
    )


def check(
    prompt: list[int],
    answer: dict[str, Any],
    reference: Reference,
    schedule: dict[str, Any] = FAST,
) -> None:
    """Lengths, temperatures by the closed form, and both log-probabilities."""
    rollout = rollout_of(prompt, answer)
    assert len(rollout) == answer["meta_info"]["completion_tokens"]
    want = expected_temperatures(schedule, len(rollout))
    assert np.abs(rollout.temperatures - want).max() < 1e-6
    check_against_reference(rollout, reference)


# --- what changes the distribution -------------------------------------------------------------


@pytest.mark.parametrize(
    ("overlap", "penalties"),
    [
        (False, {"frequency_penalty": 0.5, "presence_penalty": 0.3}),
        (True, {"frequency_penalty": 0.5, "presence_penalty": 0.3}),
        (True, {"repetition_penalty": 1.7}),
    ],
)
def test_behaviour_logprobs_include_penalties_and_bias_and_the_models_do_not(
    request: pytest.FixtureRequest, reference: Reference, overlap: bool, penalties: dict[str, float]
) -> None:
    """As SGLang applies them: on the logits, before the temperature, from the tokens so far.

    With overlap scheduling "so far" is one token older, and begins with the prompt's last token:
    what SGLang knows when it prepares the step.
    """
    process: ServerProcess = request.getfixturevalue("server" if overlap else "sequential")
    bias, end = {300: 6.0, 301: 6.0, 2: 9.0}, 2
    answer = generate(
        process,
        PROMPT,
        40,
        ignore_eos=False,
        min_new_tokens=40,
        logit_bias={str(token): value for token, value in bias.items()},
        **penalties,
    )
    tokens = answer["output_ids"]
    assert len(tokens) == 40  # min_new_tokens holds although the end is made likely
    assert len(set(tokens)) < len(tokens)  # or the penalties had nothing to do
    logits = reference.logits(PROMPT, tokens)
    counts = torch.zeros(logits.shape[1], dtype=torch.float64)
    for t, token in enumerate(tokens):
        if t:
            counts[([PROMPT[-1], *tokens][t - 1] if overlap else tokens[t - 1])] += 1
        adjusted = logits[t] - penalties.get("frequency_penalty", 0.0) * counts
        adjusted -= penalties.get("presence_penalty", 0.0) * (counts > 0)
        factor = torch.where(counts > 0, penalties.get("repetition_penalty", 1.0), 1.0)
        adjusted = torch.where(adjusted < 0, adjusted * factor, adjusted / factor)
        for biased, value in bias.items():
            adjusted[biased] += value
        adjusted[end] = -torch.inf
        tau = expected_temperatures(FAST, t + 1)[t]
        want = (adjusted / tau).log_softmax(-1)[token].item()
        assert answer["meta_info"]["logprobs"][t] == pytest.approx(want, abs=LOGPROB_TOLERANCE)
        model = logits[t].log_softmax(-1)[token].item()
        got = answer["meta_info"]["model_logprobs"][t]
        assert got == pytest.approx(model, abs=LOGPROB_TOLERANCE)


def allowed_tokens(grammar: dict[str, str], tokens: list[int], tokenizer: Any) -> torch.Tensor:
    """Which tokens the grammar allows before each of `tokens`: bool [T, V], by xgrammar itself."""
    vocabulary = len(tokenizer)
    info = xgrammar.TokenizerInfo.from_huggingface(
        tokenizer, vocab_size=vocabulary, stop_token_ids=[tokenizer.eos_token_id]
    )
    compiler = xgrammar.GrammarCompiler(info)
    ((kind, text),) = grammar.items()
    compiled = {
        "regex": compiler.compile_regex,
        "json_schema": compiler.compile_json_schema,
        "ebnf": compiler.compile_grammar,
    }[kind](text)
    matcher = xgrammar.GrammarMatcher(compiled)
    rows = []
    for token in tokens:
        bits = xgrammar.allocate_token_bitmask(1, vocabulary)
        matcher.fill_next_token_bitmask(bits)
        index = torch.arange(vocabulary)
        rows.append((bits[0, index // 32] >> (index % 32)) & 1)
        assert matcher.accept_token(token)
    return torch.stack(rows).bool()


@pytest.mark.parametrize(
    "grammar",
    [
        {"regex": "(abc|de){2,6}"},
        {"json_schema": json.dumps({"type": "array", "items": {"enum": [1, 22]}, "minItems": 2})},
        {"ebnf": 'root ::= ("x" | "yz") root | "!"'},
    ],
    ids=lambda grammar: next(iter(grammar)),
)
def test_grammars_mask_what_was_sampled_but_not_what_the_model_said(
    server: ServerProcess, reference: Reference, grammar: dict[str, str]
) -> None:
    """Behaviour: at its temperature, renormalised over exactly the tokens that were allowed."""
    answer = generate(server, PROMPT, 30, ignore_eos=False, **grammar)
    rollout = rollout_of(PROMPT, answer)
    assert len(rollout) == answer["meta_info"]["completion_tokens"]
    want = expected_temperatures(FAST, len(rollout))
    assert np.abs(rollout.temperatures - want).max() < 1e-6
    allowed = allowed_tokens(grammar, answer["output_ids"], reference.tokenizer)
    assert (allowed.sum(1) > 1).any()  # or there was nothing to choose
    logits = reference.logits(PROMPT, rollout.token_ids)
    masked = (logits / torch.tensor(want).unsqueeze(1)).masked_fill(~allowed, -torch.inf)
    chosen = torch.from_numpy(rollout.token_ids).unsqueeze(1)
    for got, exact in (
        (rollout.logprobs, masked.log_softmax(-1)),
        (rollout.model_logprobs, logits.log_softmax(-1)),
    ):
        assert np.abs(got - exact.gather(1, chosen).squeeze(1).numpy()).max() < LOGPROB_TOLERANCE


# --- where answers stop, pause and go on -------------------------------------------------------


ENDINGS: list[dict[str, Any]] = [
    {"stop": ["e", "t"]},
    {"stop": ["e", "t"], "no_stop_trim": True},
    {"stop_regex": "[et]"},
    {"stop_token_ids": list(range(3, 300))},
]


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: " ".join(ending))
@pytest.mark.parametrize("stream", [False, True])
def test_what_stops_an_answer_leaves_as_many_values_as_tokens(
    server: ServerProcess, reference: Reference, stream: bool, ending: dict[str, Any]
) -> None:
    schedule = {**FAST, "warmup": 0}  # no token at temperature 1
    params = {"max_new_tokens": 40, "annealing": schedule, **ending}
    matched = []
    for seed in range(4):
        body = {"input_ids": [*PROMPT, seed + 10], "sampling_params": params, "stream": stream}
        response = httpx.post(f"{server.url}/generate", json=body, timeout=60)
        if stream:
            events = [e[6:] for e in response.text.split("\n\n") if e.startswith("data: {")]
            answer = json.loads(events[-1])
        else:
            answer = response.json()
        check([*PROMPT, seed + 10], answer, reference, schedule)
        reason = answer["meta_info"]["finish_reason"]
        matched.append(reason.get("matched") if reason["type"] == "stop" else None)
    assert set(matched) - {None, reference.tokenizer.eos_token_id}  # not only the usual ends


LONG = 1500  # tokens: seconds of work, so that what comes next comes in its midst
SLOW = {**FAST, "decay": 2000.0}  # falls at every one of them, so that each shows its t


def endless(prompt: list[int], schedule: dict[str, Any]) -> dict[str, Any]:
    """A /generate request of LONG tokens."""
    params = {"max_new_tokens": LONG, "ignore_eos": True, "annealing": schedule}
    return {"input_ids": prompt, "sampling_params": params}


def while_running(server: ServerProcess, bodies: list[dict[str, Any]]) -> list[Future[Any]]:
    """Send /generate requests of LONG tokens; return when all are being generated.

    Requests are served in order of arrival, so a short one that ends was batched with them.
    """
    pool = ThreadPoolExecutor(len(bodies))
    futures = [pool.submit(post, server, "/generate", body) for body in bodies]
    pool.shutdown(wait=False)
    for _ in range(3):
        generate(server, PROMPT, 3)
    assert not any(future.done() for future in futures)
    return futures


@pytest.mark.parametrize("mode", ["in_place", "retract", "abort"])
def test_the_schedule_goes_on_after_a_pause(
    server: ServerProcess, reference: Reference, mode: str
) -> None:
    (answer,) = while_running(server, [endless(PROMPT, SLOW)])
    post(server, "/pause_generation", {"mode": mode})
    try:
        if mode == "retract":
            flush = f"{server.url}/flush_cache"
            httpx.post(flush, headers=server.admin_headers, timeout=60).raise_for_status()
        assert mode == "abort" or not answer.done()
    finally:
        post(server, "/continue_generation", {})
    final = answer.result(timeout=120)
    tokens = final["meta_info"]["completion_tokens"]
    if mode == "abort":
        assert 0 < tokens < LONG
        assert final["meta_info"]["finish_reason"]["type"] == "abort"
    else:
        assert tokens == LONG
    if mode == "retract":
        assert final["meta_info"]["num_retractions"] == 1
    check(PROMPT, final, reference, SLOW)


def test_an_abort_in_mid_flight_leaves_the_others_exact(
    server: ServerProcess, reference: Reference
) -> None:
    """One request is aborted by its id, one stream is dropped by its client, three go on."""
    asked = [(PROMPT * n, {**SLOW, "decay": 1800.0 + 100.0 * n}) for n in (1, 2, 3, 4)]
    mine, *rest = asked
    answers = while_running(server, [endless(*each) for each in rest])
    url = f"{server.url}/generate"
    body = {**endless(*mine), "stream": True}
    with httpx.stream("POST", url, json=body, timeout=60) as response:
        next(response.iter_lines())  # and the connection closes
    with httpx.stream("POST", url, json=body, timeout=60) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: {"))
        first = json.loads(next(lines)[len("data: ") :])
        abort = f"{server.url}/abort_request"
        rid = {"rid": first["meta_info"]["id"]}
        httpx.post(abort, json=rid, headers=server.admin_headers, timeout=60).raise_for_status()
        last = [first, *(json.loads(line[len("data: ") :]) for line in lines)][-1]
    finals = [last, *(answer.result(timeout=120) for answer in answers)]
    assert finals[0]["meta_info"]["finish_reason"]["type"] == "abort"
    counts = [final["meta_info"]["completion_tokens"] for final in finals]
    assert 0 < counts[0] < LONG
    assert counts[1:] == [LONG] * 3
    for (prompt, schedule), final in zip(asked, finals, strict=True):
        check(prompt, final, reference, schedule)


@pytest.mark.parametrize("route", ["/generate", "/v1/rollouts", "/v1/completions"])
def test_an_abort_after_retraction_keeps_what_was_generated(
    server: ServerProcess, reference: Reference, route: str
) -> None:
    """The request waits in the queue again, from which SGLang answers without going through
    the sampler: a trainer that collects unfinished answers while memory is short."""
    params = {"max_new_tokens": LONG, "ignore_eos": True}
    text = {"model": "tiny", "prompt": PROMPT, "max_tokens": LONG, "ignore_eos": True}
    body = {
        "/generate": endless(PROMPT, SLOW),
        "/v1/rollouts": {"prompts": [PROMPT], "annealing": SLOW, "sampling_params": params},
        "/v1/completions": {**text, "annealing": SLOW},
    }[route]
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(post, server, route, body)
        generate(server, PROMPT, 60)  # SGLang tells of unfinished answers every 50 tokens
        generate(server, PROMPT, 60)
        post(server, "/pause_generation", {"mode": "retract"})
        abort = httpx.post(
            f"{server.url}/abort_request",
            json={"rid": "", "abort_all": True},
            headers=server.admin_headers,
            timeout=60,
        )
        post(server, "/continue_generation", {})
        abort.raise_for_status()
        answer = call.result(timeout=60)
    if route == "/generate":
        rollout, reason = rollout_of(PROMPT, answer), answer["meta_info"]["finish_reason"]["type"]
    elif route == "/v1/rollouts":
        (told,) = answer["groups"][0]["answers"]
        assert told["error"] is None
        names = ("token_ids", "temperatures", "logprobs", "model_logprobs")
        columns = {name: told[name] for name in names}
        rollout = Rollout(prompt_token_ids=PROMPT, **columns)
        reason = told["finish_reason"]
    else:
        (choice,) = answer["choices"]
        rollout, reason = Rollout.model_validate(choice["rollout"]), choice["finish_reason"]
    assert reason == "abort"
    assert 50 <= len(rollout) < LONG
    assert np.abs(rollout.temperatures - expected_temperatures(SLOW, len(rollout))).max() < 1e-6
    check_against_reference(rollout, reference)


def test_partial_rollouts_resume_their_schedule_and_prefix_hits_do_not_move_it(
    server: ServerProcess, reference: Reference
) -> None:
    prompt = [*range(100, 164)]
    first = generate(server, prompt, 10)
    check(prompt, first, reference)
    so_far = prompt + first["output_ids"]
    resumed = {**FAST, "position_offset": 10}
    second = generate(server, so_far, 15, annealing=resumed)
    assert second["meta_info"]["cached_tokens"] > 60
    check(so_far, second, reference, resumed)


# --- other things that requests ask for --------------------------------------------------------


def test_logprobs_of_prompt_tokens_are_the_models_at_temperature_one(
    server: ServerProcess, reference: Reference
) -> None:
    """Beside those of the answer, SGLang's own, which are at the schedule's temperature."""
    prompt = [*range(200, 220)]
    answer = generate(server, prompt, 8, return_logprob=True, logprob_start_len=0)
    check(prompt, answer, reference)
    entries = answer["meta_info"]["input_token_logprobs"]
    assert [token for _, token, _ in entries] == prompt
    logits = reference.logits(prompt[:1], prompt[1:]).log_softmax(-1)
    want = logits.gather(1, torch.tensor(prompt[1:]).unsqueeze(1)).flatten().tolist()
    got = [value for value, _, _ in entries[1:]]  # the first token has none
    assert got == pytest.approx(want, abs=LOGPROB_TOLERANCE)
    outputs = [value for value, _, _ in answer["meta_info"]["output_token_logprobs"]]
    assert outputs == pytest.approx(answer["meta_info"]["logprobs"], abs=LOGPROB_TOLERANCE)


def test_a_seed_decides_the_tokens_whoever_else_is_in_the_batch(
    server: ServerProcess, reference: Reference
) -> None:
    """SGLang looks at seeds in its deterministic mode only, which does not start on a CPU."""
    alone = generate(server, PROMPT, 20, sampling_seed=7)
    check(PROMPT, alone, reference)
    assert alone["meta_info"]["sampling"]["seed"] == 7
    asked = [{"sampling_seed": 7}, {}, {"sampling_seed": 8}, {}, {"sampling_seed": 7}, {}]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda more: generate(server, PROMPT, 20, **more), asked))
    for answer in answers:
        check(PROMPT, answer, reference)
    ids = [tuple(answer["output_ids"]) for answer in answers]
    assert ids[0] == ids[4] == tuple(alone["output_ids"])
    assert len(set(ids)) == 5  # the rest differ: from it, and from each other


SEEDED = [
    {},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"top_k": 5},
    {"top_k": 30, "top_p": 0.8, "min_p": 0.1},
]


def test_a_seed_decides_the_tokens_also_beside_requests_with_cuts(
    server: ServerProcess, reference: Reference
) -> None:
    """SGLang draws all rows of a batch in another way when one has cuts, and ends when that one has
    min_p. Each is alone first; then all are together, with greedy and unseeded ones."""
    seeded = [{**cuts, "sampling_seed": 7} for cuts in SEEDED]
    alone = [generate(server, PROMPT, 20, **more)["output_ids"] for more in seeded]
    greedy = {"annealing": None, "temperature": 0.0}
    asked = [*seeded, greedy, {"min_p": 0.3}, {"top_p": 0.5}]
    for _ in range(3):
        with ThreadPoolExecutor(len(asked)) as pool:
            answers = list(pool.map(lambda more: generate(server, PROMPT, 20, **more), asked))
        assert [answer["output_ids"] for answer in answers[: len(seeded)]] == alone
        check(PROMPT, answers[0], reference)


def test_seeded_tokens_have_the_distribution_that_is_reported(server: ServerProcess) -> None:
    """One first token for each of 600 seeds: chi-square, false alarm in a million."""
    params = {"max_new_tokens": 1, "annealing": {"schedule": "constant", "tau": 0.5}}
    many = [{**params, "sampling_seed": seed} for seed in range(600)]
    answers = post(server, "/generate", {"input_ids": [PROMPT] * 600, "sampling_params": many})
    drawn = Counter(answer["output_ids"][0] for answer in answers)
    chance = {a["output_ids"][0]: np.exp(a["meta_info"]["logprobs"][0]) for a in answers}
    common = [token for token, p in chance.items() if 600 * p >= 5]
    counts = [drawn[token] for token in common]
    expected = [600 * chance[token] for token in common]
    rest = 600 - sum(expected)
    assert rest >= 5
    p_value = stats.chisquare([*counts, 600 - sum(counts)], [*expected, rest]).pvalue
    assert p_value > 1e-6


# --- other ways to run the server --------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that starts a server with further flags, as a context."""

    def start(*flags: str, **environ: str) -> ServerProcess:
        log = tmp_path_factory.mktemp("corner") / "server.log"
        arguments = ["--model-path", str(tiny_model), *TINY_FLAGS, *flags]
        return ServerProcess(arguments, log, environ=environ)

    return start


def check_refused(process: ServerProcess, flag: str) -> None:
    """A schedule or the arrays are a 400 that names the flag on every route; plain requests work.

    Plain requests of one token: SGLang's verification of drafts dies on a CPU.
    """
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    text = {"model": "tiny", "prompt": "hi", "max_tokens": 1}
    params = {"max_new_tokens": 1}
    calls: list[tuple[str, str, dict[str, Any], tuple[str, ...]]] = []
    for fields in ({"annealing": {}}, {"rollout": True}, {"custom_params": {"annealing": {}}}):
        named = tuple(fields)
        native = {"text": "hi", "sampling_params": {**params, **fields}}
        calls.append(("POST", "/v1/chat/completions", {**chat, **fields}, named))
        calls.append(("POST", "/v1/completions", {**text, **fields}, named))
        calls.append(("POST", "/generate", native, named))
    rollouts = {"prompts": ["hi"], "n": 2, "sampling_params": params}
    calls.append(("POST", "/v1/rollouts", {**rollouts, "annealing": {}}, ("annealing",)))
    calls.append(("POST", "/v1/rollouts", rollouts, ("rollout",)))
    calls.append(("PUT", "/v1/annealing", {"annealing": {}}, ("annealing",)))
    for method, route, body, named in calls:
        headers = process.admin_headers
        answer = httpx.request(method, process.url + route, json=body, headers=headers, timeout=60)
        assert answer.status_code == 400, (route, body, answer.text)
        assert flag in answer.text
        if named != ("custom_params",):  # such an answer keeps SGLang's shape
            assert answer.json()["error"]["param"] in named, (route, body)

    plain = {"text": "hi", "sampling_params": params}
    assert len(post(process, "/generate", plain)["output_ids"]) == 1
    for route, body in (("/v1/chat/completions", chat), ("/v1/completions", text)):
        (choice,) = post(process, route, body)["choices"]
        assert choice["finish_reason"] == "length"


def test_speculative_decoding_is_refused(start: Any) -> None:
    with start("--speculative-algorithm", "NGRAM", "--skip-server-warmup") as process:
        process.wait_until_ready()
        check_refused(process, "--speculative-algorithm")


# What deterministic inference needs, see SGLang's batch_invariant_ops: kernels in Triton
DETERMINISTIC = ("--attention-backend", "triton")


@pytest.mark.gpu
def test_rl_on_policy_target_is_refused(start: Any) -> None:
    with start("--rl-on-policy-target", "fsdp", *DETERMINISTIC) as process:
        process.wait_until_ready()
        check_refused(process, "--rl-on-policy-target")


@pytest.mark.gpu
def test_deterministic_inference_repeats_an_annealed_answer_bit_by_bit(start: Any) -> None:
    """Alone or among others. Which token a seed draws: test_cpu_kernels.py."""
    with start("--enable-deterministic-inference", *DETERMINISTIC) as process:
        process.wait_until_ready()

        def one(seed: int) -> dict[str, Any]:
            return generate(process, PROMPT, 40, sampling_seed=seed, return_logprob=True)

        alone = one(7)
        with ThreadPoolExecutor(8) as pool:
            others = list(pool.map(one, range(8)))
        for name in ("temperatures", "logprobs", "model_logprobs"):
            assert others[7]["meta_info"][name] == alone["meta_info"][name]
        assert others[7]["output_ids"] == alone["output_ids"]
        assert len({tuple(answer["output_ids"]) for answer in others}) == 8
        for answer in others:
            meta = answer["meta_info"]
            assert meta["temperatures"] == pytest.approx(expected_temperatures(FAST, 40), abs=1e-6)
            sglangs = [value for value, *_ in meta["output_token_logprobs"]]
            assert meta["logprobs"] == pytest.approx(sglangs, abs=1e-4)
        params = {"max_new_tokens": 12, "ignore_eos": True}
        body = {"prompts": ["def "], "n": 8, "annealing": FAST, "sampling_params": params}
        (group,) = post(process, "/v1/rollouts", body)["groups"]
        assert len({tuple(answer["token_ids"]) for answer in group["answers"]}) == 8


def test_an_embedding_server_embeds_and_refuses_to_generate(start: Any) -> None:
    """A default schedule is no obstacle."""
    with start("--is-embedding", EAD_ANNEALING="{}") as process:
        process.wait_until_ready()
        body = {"model": "tiny", "input": "hello"}
        for unknown in ([10**6], [[5], [-1]]):  # SGLang's scheduler would die of them
            answer = httpx.post(
                f"{process.url}/v1/embeddings", json={**body, "input": unknown}, timeout=60
            )
            assert answer.status_code == 400
            assert "must be token ids in [0, 1023]" in answer.text
        params = {"max_new_tokens": 2}
        elsewhere, embeds = "annealing: not on this route", "does not generate on this server"
        for route, asked, says in (
            ("/v1/embeddings", {**body, "annealing": FAST}, elsewhere),
            ("/encode", {"text": "hello", "annealing": FAST}, elsewhere),
            ("/generate", {"text": "x", "sampling_params": {**params, "annealing": FAST}}, embeds),
            ("/generate", {"text": "x", "sampling_params": params}, embeds),
            ("/v1/rollouts", {"prompts": ["x"], "n": 2, "sampling_params": params}, embeds),
            ("/v1/completions", {"model": "tiny", "prompt": "x", "annealing": FAST}, embeds),
        ):
            refused = httpx.post(process.url + route, json=asked, timeout=60)
            assert refused.status_code == 400, (route, refused.text)
            assert says in refused.json()["error"]["message"]
        vectors = [post(process, "/v1/embeddings", body)["data"][0]["embedding"] for _ in range(2)]
        assert len(vectors[0]) > 8
        assert vectors[1] == pytest.approx(vectors[0], abs=1e-4)  # the second hits the prefix cache


def test_parallel_ranks_anneal_exactly_and_draw_differently(
    start: Any, reference: Reference, tmp_path: Path
) -> None:
    """Two data-parallel ranks of two tensor-parallel ranks each.

    The two of one model sample each for itself, so they must draw alike: else what one of them
    computes next is about another token, and no log-probability is right. Two data-parallel ranks
    must not, or a group of 8 answers, 4 to a rank, holds each answer twice. Kinds with state are
    among the answers, with prompts of more than one chunk, and new weights reach all four ranks.
    """
    cores = sorted(os.sched_getaffinity(0))
    binding = f"{cores[0]}|{cores[-1]}"  # SGLang wants it said where each rank computes
    flags = ("--tp", "2", "--dp", "2", "--chunked-prefill-size", "64", "--enable-mixed-chunk")
    with start(*flags, SGLANG_CPU_OMP_THREADS_BIND=f"{binding}|{binding}") as process:
        process.wait_until_ready()
        with ThreadPoolExecutor(8) as pool:
            calls = [pool.submit(generate, process, [*PROMPT, i], 30 + i) for i in range(8)]
            for index, call in enumerate(calls):
                check([*PROMPT, index], call.result(timeout=120), reference)
        params = {"max_new_tokens": 12, "ignore_eos": True}
        for prompt in ("def ", "class ", "for "):
            body = {"prompts": [prompt], "n": 8, "annealing": FAST, "sampling_params": params}
            (group,) = post(process, "/v1/rollouts", body)["groups"]
            assert len({tuple(answer["token_ids"]) for answer in group["answers"]}) == 8
        log = process.log.read_text(errors="replace")
        for rank in ("DP0 TP0", "DP1 TP0"):
            assert re.search(rf"{rank}\] Decode batch", log), rank  # each had its share
        check_all_kinds(process, reference, 4 * len(WITH_STATE), WITH_STATE)
        with Client(process.url, admin_api_key=process.admin_api_key, timeout=120) as client:
            for seed, way in enumerate(("tensors", "disk")):
                new = perturbed(reference, seed)
                publisher = weight_publisher(client, config(way, tmp_path / "weights"))
                publisher.publish(named_tensors(new), way)
                check_served(client, new, way)
            publisher = weight_publisher(client, config("distributed", tmp_path))
            with pytest.raises(WeightUpdateFailed, match="no broadcast to data-parallel replicas"):
                publisher.publish(named_tensors(reference.model), "distributed")
            check_served(client, new, way)


def check_served(client: Client, model: Any, version: str) -> None:
    """By all ranks: 8 answers are on either of two replicas."""
    (group,) = client.rollouts(["def "], n=8, annealing=FAST, max_new_tokens=12).groups
    for answer in group.answers:
        assert answer.rollout is not None
        assert answer.rollout.weight_version == version
        assert gaps(answer.rollout, model).max() < LOGPROB_TOLERANCE


@pytest.fixture(scope="module")
def sequential(start: Any) -> Iterator[ServerProcess]:
    """Neither overlap scheduling nor a prefix cache."""
    with start("--disable-overlap-schedule", "--disable-radix-cache") as process:
        process.wait_until_ready()
        yield process


@pytest.mark.gpu
def test_adapters_share_a_batch_with_the_model_itself(
    start: Any, tiny_model: Path, reference: Reference, tmp_path: Path
) -> None:
    """A random LoRA adapter of rank 4 on the query and value projections, in every second request.

    On a CPU, SGLang's LoRA layers ask for pinned memory at start-up and fail. Its kernels multiply
    in TF32, hence the tolerance; the adapter moves log-probabilities by far more.
    """
    rank, alpha, tolerance = 4, 8, 0.02
    adapted = Reference(tiny_model)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for number, layer in enumerate(adapted.model.model.layers):
        for name in ("q_proj", "v_proj"):
            weight = getattr(layer.self_attn, name).weight.data
            down = 0.2 * torch.randn(rank, weight.shape[1], generator=generator)
            up = 0.2 * torch.randn(weight.shape[0], rank, generator=generator)
            weight += alpha / rank * up @ down
            prefix = f"base_model.model.model.layers.{number}.self_attn.{name}"
            tensors |= {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none"}
    about["target_modules"] = ["q_proj", "v_proj"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))

    def one(index: int) -> dict[str, Any]:
        params = {"max_new_tokens": 25, "ignore_eos": True, "annealing": FAST}
        body = {"input_ids": [*PROMPT, index], "sampling_params": params}
        return post(process, "/generate", {**body, "lora_path": "tilt" if index % 2 else None})

    flags = ("--enable-lora", "--lora-paths", f"tilt={tmp_path}", "--max-lora-rank", str(rank))
    with start(*flags) as process, ThreadPoolExecutor(6) as pool:
        process.wait_until_ready()
        answers = list(pool.map(one, range(10, 16)))
    for index, answer in zip(range(10, 16), answers, strict=True):
        prompt = [*PROMPT, index]
        if index % 2 == 0:
            check(prompt, answer, reference)
            continue
        rollout = rollout_of(prompt, answer)
        taus = expected_temperatures(FAST, 25)
        assert np.abs(rollout.temperatures - taus).max() < 1e-6
        chosen = (np.arange(25), rollout.token_ids)
        ours, base = (
            model.logits(prompt, rollout.token_ids).log_softmax(-1).numpy()[chosen]
            for model in (adapted, reference)
        )
        assert np.abs(rollout.model_logprobs - ours).max() < tolerance
        assert np.abs(base - ours).max() > 10 * tolerance
        logits = adapted.logits(prompt, rollout.token_ids) / torch.tensor(taus).unsqueeze(1)
        tempered = logits.log_softmax(-1).numpy()[chosen]
        assert np.abs(rollout.logprobs - tempered).max() < tolerance / min(taus)
