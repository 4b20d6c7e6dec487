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
from conftest import TINY_FLAGS, Reference
from scipy import stats
from test_server import (
    FAST,
    LOGPROB_TOLERANCE,
    check_against_reference,
    expected_temperatures,
    post,
)

from ead_client import Rollout
from ead_server.process import ServerProcess

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


def check(prompt: list[int], answer: dict[str, Any], reference: Reference, offset: int = 0) -> None:
    """Lengths, temperatures by the closed form from t = offset on, and both log-probabilities."""
    rollout = rollout_of(prompt, answer)
    assert len(rollout) == answer["meta_info"]["completion_tokens"]
    want = expected_temperatures({**FAST, "position_offset": offset}, len(rollout))
    assert np.abs(rollout.temperatures - want).max() < 1e-6
    check_against_reference(rollout, reference)


# --- what changes the distribution -------------------------------------------------------------


def test_behaviour_logprobs_include_penalties_and_bias(
    sequential: ServerProcess, reference: Reference
) -> None:
    """As SGLang applies them: on the logits, before the temperature, from the tokens so far.

    With overlap scheduling SGLang's counts are a token or so old. The recorded value is then of
    what was really sampled from, but no longer of this formula; hence a server without overlap.
    """
    bias = {"300": 6.0, "301": 6.0}
    answer = generate(
        sequential, PROMPT, 25, frequency_penalty=0.5, presence_penalty=0.3, logit_bias=bias
    )
    tokens = answer["output_ids"]
    assert len(set(tokens)) < len(tokens)  # or the penalties had nothing to do
    logits = reference.logits(PROMPT, tokens)
    counts = torch.zeros(logits.shape[1], dtype=torch.float64)
    for t, token in enumerate(tokens):
        adjusted = logits[t] - 0.5 * counts - 0.3 * (counts > 0)
        for biased, value in bias.items():
            adjusted[int(biased)] += value
        tau = answer["meta_info"]["temperatures"][t]
        want = (adjusted / tau).log_softmax(-1)[token].item()
        assert answer["meta_info"]["logprobs"][t] == pytest.approx(want, abs=LOGPROB_TOLERANCE)
        model = logits[t].log_softmax(-1)[token].item()
        got = answer["meta_info"]["model_logprobs"][t]
        assert got == pytest.approx(model, abs=LOGPROB_TOLERANCE)
        counts[token] += 1


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
    """Behaviour: renormalised over the allowed tokens, so at least the full softmax's value."""
    answer = generate(server, PROMPT, 30, ignore_eos=False, **grammar)
    rollout = rollout_of(PROMPT, answer)
    assert len(rollout) == answer["meta_info"]["completion_tokens"]
    if "regex" in grammar:
        assert re.fullmatch("(abc|de|a|ab|d)*", answer["text"])
    want = expected_temperatures(FAST, len(rollout))
    assert np.abs(rollout.temperatures - want).max() < 1e-6
    logits = reference.logits(PROMPT, rollout.token_ids)
    chosen = torch.from_numpy(rollout.token_ids).unsqueeze(1)
    model = logits.log_softmax(-1).gather(1, chosen).squeeze(1).numpy()
    assert np.abs(rollout.model_logprobs - model).max() < LOGPROB_TOLERANCE
    tau = torch.from_numpy(rollout.temperatures).double().unsqueeze(1)
    unmasked = (logits / tau).log_softmax(-1).gather(1, chosen).squeeze(1).numpy()
    assert (rollout.logprobs >= unmasked - LOGPROB_TOLERANCE).all()
    assert (rollout.logprobs > unmasked + 1.0).any()  # few tokens were allowed
    assert (rollout.logprobs <= 1e-6).all()


def test_a_regex_of_single_tokens_is_renormalised_over_just_those(
    server: ServerProcess, reference: Reference
) -> None:
    """Two letters that are one token each: the allowed set is known, and so is its mass."""
    tokenizer = reference.tokenizer
    texts = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    answer = generate(server, PROMPT, 12, ignore_eos=False, regex="[qz]{12}")
    tokens = answer["output_ids"]
    logits = reference.logits(PROMPT, tokens)
    written = 0
    for t, token in enumerate(tokens[:6]):  # any mix of q and z that still fits in 12
        allowed = [i for i, text in enumerate(texts) if re.fullmatch("[qz]+", text)]
        assert token in allowed
        tau = answer["meta_info"]["temperatures"][t]
        want = (logits[t] / tau)[allowed].log_softmax(-1)[allowed.index(token)].item()
        assert answer["meta_info"]["logprobs"][t] == pytest.approx(want, abs=LOGPROB_TOLERANCE)
        written += len(texts[token])
        assert written <= 6 or all(len(texts[i]) == 1 for i in allowed)


# --- where answers stop, pause and go on -------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("no_stop_trim", [False, True])
def test_stop_strings_leave_as_many_values_as_tokens(
    server: ServerProcess, reference: Reference, stream: bool, no_stop_trim: bool
) -> None:
    params = {
        "max_new_tokens": 40,
        "annealing": FAST,
        "stop": ["e", "t"],
        "no_stop_trim": no_stop_trim,
    }
    for seed in range(4):
        body = {"input_ids": [*PROMPT, seed + 10], "sampling_params": params, "stream": stream}
        response = httpx.post(f"{server.url}/generate", json=body, timeout=60)
        if stream:
            events = [e[6:] for e in response.text.split("\n\n") if e.startswith("data: {")]
            answer = json.loads(events[-1])
        else:
            answer = response.json()
        check([*PROMPT, seed + 10], answer, reference)


LONG = 1500  # tokens: seconds of work, so that what comes next comes in its midst


def while_running(server: ServerProcess, bodies: list[dict[str, Any]]) -> list[Future[Any]]:
    """Send annealed /generate requests of LONG tokens; return when all are being generated.

    Requests are served in order of arrival, so a short one that ends was batched with them.
    """
    params = {"max_new_tokens": LONG, "ignore_eos": True, "annealing": FAST}
    pool = ThreadPoolExecutor(len(bodies))
    futures = []
    for body in bodies:
        request = {"input_ids": PROMPT, "sampling_params": params, **body}
        futures.append(pool.submit(post, server, "/generate", request))
    pool.shutdown(wait=False)
    for _ in range(3):
        generate(server, PROMPT, 3)
    assert not any(future.done() for future in futures)
    return futures


@pytest.mark.parametrize("mode", ["in_place", "retract", "abort"])
def test_the_schedule_goes_on_after_a_pause(
    server: ServerProcess, reference: Reference, mode: str
) -> None:
    (answer,) = while_running(server, [{}])
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
    check(PROMPT, final, reference)


def test_an_abort_in_mid_flight_leaves_the_others_exact(
    server: ServerProcess, reference: Reference
) -> None:
    """One request is aborted by its id, one stream is dropped by its client, three go on."""
    answers = while_running(server, [{}] * 3)
    url = f"{server.url}/generate"
    body = {
        "input_ids": PROMPT,
        "sampling_params": {"max_new_tokens": LONG, "ignore_eos": True, "annealing": FAST},
        "stream": True,
    }
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
    for final in finals:
        check(PROMPT, final, reference)


def test_partial_rollouts_resume_their_schedule_and_prefix_hits_do_not_move_it(
    server: ServerProcess, reference: Reference
) -> None:
    prompt = [*range(100, 164)]
    first = generate(server, prompt, 10)
    check(prompt, first, reference)
    so_far = prompt + first["output_ids"]
    second = generate(server, so_far, 15, annealing={**FAST, "position_offset": 10})
    assert second["meta_info"]["cached_tokens"] > 60
    check(so_far, second, reference, offset=10)


# --- other things that requests ask for --------------------------------------------------------


def test_logprobs_of_prompt_tokens_are_those_of_the_same_request_without_schedule(
    server: ServerProcess, reference: Reference
) -> None:
    prompt = [*range(200, 220)]
    wanted = {"return_logprob": True, "logprob_start_len": 0}
    annealed = generate(server, prompt, 8, **wanted)
    plain = generate(server, prompt, 8, annealing=None, **wanted)
    check(prompt, annealed, reference)

    def values(answer: dict[str, Any]) -> list[float]:
        entries = answer["meta_info"]["input_token_logprobs"]
        assert [token for _, token, _ in entries] == prompt
        return [value for value, _, _ in entries[1:]]  # the first token has none

    assert values(annealed) == pytest.approx(values(plain), abs=LOGPROB_TOLERANCE)
    outputs = [value for value, _, _ in annealed["meta_info"]["output_token_logprobs"]]
    assert outputs == pytest.approx(annealed["meta_info"]["logprobs"], abs=LOGPROB_TOLERANCE)


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


def test_an_embedding_request_on_a_generating_server_is_sglangs_own_matter(
    server: ServerProcess,
) -> None:
    """The route knows no `annealing`; what it says and that the server lives does not change."""
    body = {"model": "tiny", "input": "hello"}
    plain = httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=60)
    asked = httpx.post(f"{server.url}/v1/embeddings", json={**body, "annealing": FAST}, timeout=60)
    assert plain.status_code == asked.status_code == 400
    assert len(generate(server, PROMPT, 3)["output_ids"]) == 3


# --- other ways to run the server --------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that starts a server with further flags, as a context."""

    def start(*flags: str, **environ: str) -> ServerProcess:
        log = tmp_path_factory.mktemp("corner") / "server.log"
        arguments = ["--model-path", str(tiny_model), *TINY_FLAGS, *flags]
        return ServerProcess(arguments, log, environ=environ)

    return start


def test_a_mode_that_cannot_be_exact_is_refused_with_its_reason(start: Any) -> None:
    """The other such modes do not start on a CPU; test_plugin.py goes through them all."""
    with start(SGLANG_RETURN_ORIGINAL_LOGPROB="1") as process:
        process.wait_until_ready()
        message = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
        for fields in ({"annealing": {}}, {"rollout": True}, {"custom_params": {"annealing": {}}}):
            for route, body in (
                ("/v1/chat/completions", {"model": "tiny", **message, **fields}),
                ("/generate", {"text": "x", "sampling_params": {"max_new_tokens": 3, **fields}}),
            ):
                answer = httpx.post(f"{process.url}{route}", json=body, timeout=60)
                assert answer.status_code == 400, (route, fields)
                assert "SGLANG_RETURN_ORIGINAL_LOGPROB" in answer.text
        plain = {"model": "tiny", **message, "logprobs": True}
        assert len(post(process, "/v1/chat/completions", plain)["choices"]) == 1


def test_an_embedding_server_embeds_and_ignores_a_default_schedule(start: Any) -> None:
    with start("--is-embedding", EAD_ANNEALING="{}") as process:
        process.wait_until_ready()
        body = {"model": "tiny", "input": "hello"}
        annealed = {"text": "x", "sampling_params": {"max_new_tokens": 2, "annealing": FAST}}
        refused = httpx.post(f"{process.url}/generate", json=annealed, timeout=60)
        assert refused.status_code == 400
        assert "its model does not generate" in refused.text
        plain = post(process, "/v1/embeddings", body)
        asked = post(process, "/v1/embeddings", {**body, "annealing": FAST})
        vectors = [answer["data"][0]["embedding"] for answer in (plain, asked)]
        assert len(vectors[0]) > 8
        assert vectors[1] == pytest.approx(vectors[0], abs=1e-4)  # the second hits the prefix cache


PARALLEL = [("--tp", "2"), ("--dp", "2")]


@pytest.mark.parametrize("flags", PARALLEL, ids=" ".join)
def test_parallel_servers_anneal_exactly(
    start: Any, reference: Reference, flags: tuple[str, str]
) -> None:
    cores = sorted(os.sched_getaffinity(0))
    binding = f"{cores[0]}|{cores[-1]}"  # SGLang wants it said where each rank computes
    with start(*flags, SGLANG_CPU_OMP_THREADS_BIND=binding) as process:
        process.wait_until_ready()
        with ThreadPoolExecutor(8) as pool:
            calls = [pool.submit(generate, process, [*PROMPT, i], 30 + i) for i in range(8)]
            for index, call in enumerate(calls):
                check([*PROMPT, index], call.result(timeout=120), reference)


@pytest.fixture(scope="module")
def sequential(start: Any) -> Iterator[ServerProcess]:
    """Neither overlap scheduling nor a prefix cache."""
    with start("--disable-overlap-schedule", "--disable-radix-cache") as process:
        process.wait_until_ready()
        yield process


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LoRA adapter of rank 4 on the query and value projections."""
    from safetensors.torch import save_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tiny_model)
    heads = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    sizes = {"q_proj": config.hidden_size, "v_proj": heads}
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for name, size in sizes.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for part, shape in (("lora_A", (4, config.hidden_size)), ("lora_B", (size, 4))):
                tensors[f"{prefix}.{part}.weight"] = torch.randn(*shape, generator=generator)
    folder = tmp_path_factory.mktemp("adapter")
    save_file(tensors, folder / "adapter_model.safetensors")
    about = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": [*sizes],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder


@pytest.mark.gpu
def test_adapters_share_a_batch_with_the_model_itself(
    start: Any, adapter: Path, reference: Reference
) -> None:
    """On a CPU, SGLang's LoRA layers ask for pinned memory at start-up and fail."""
    schedule = {"max_new_tokens": 25, "ignore_eos": True, "annealing": FAST}

    flags = ("--enable-lora", "--lora-paths", f"tilt={adapter}", "--max-lora-rank", "4")

    def one(index: int) -> dict[str, Any]:
        body = {"input_ids": [*PROMPT, index], "sampling_params": schedule}
        adapter = {"lora_path": "tilt"} if index % 2 else {}
        return post(lora_server, "/generate", {**body, **adapter})

    with start(*flags) as lora_server, ThreadPoolExecutor(6) as pool:
        lora_server.wait_until_ready()
        answers = list(pool.map(one, range(10, 16)))
    for index, answer in zip(range(10, 16), answers, strict=True):
        prompt = [*PROMPT, index]
        if index % 2 == 0:
            check(prompt, answer, reference)
            continue
        rollout = rollout_of(prompt, answer)
        assert np.abs(rollout.temperatures - expected_temperatures(FAST, 25)).max() < 1e-6
        model = reference.logits(prompt, rollout.token_ids).log_softmax(-1)
        chosen = model.numpy()[np.arange(25), rollout.token_ids]
        assert np.abs(rollout.model_logprobs - chosen).max() > 0.01  # the adapter's, not its base's
