"""The bodies of many sampled answers, as SGLang's /generate writes them and as /v1/rollouts does.

Real answers to one prompt, and, from their recorded shapes, 64 prompts x 16 answers x 1024 tokens,
which no small machine generates in minutes: an answer is taken as it came and its columns are
replaced by as many tokens as wanted. Token ids are uniform over a vocabulary, the text is what
SmolLM2's tokenizer makes of them (6.7 bytes a token, where English has 4), log-probabilities are
recorded ones times random factors. SGLang's own function writes SGLang's body, ours writes ours.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import httpx
import numpy as np
import orjson
import torch
from numpy.typing import NDArray

from ead_sampler import parse_annealing
from ead_server import media_types
from ead_server.launch import models
from ead_server.rollouts import packing
from ead_server.rollouts.job import Group, Prompt

Json = dict[str, Any]
Column = NDArray[Any]  # [PROMPTS, ANSWERS, TOKENS]

PROMPT = "The sea is"
PROMPTS, ANSWERS, TOKENS = 64, 16, 1024  # of the big case
SHAPE = (PROMPTS, ANSWERS, TOKENS)


class Bodies(NamedTuple):
    """One prompt's answers as two servers sent them."""

    native: bytes  # SGLang's /generate with log-probabilities
    json: bytes  # /v1/rollouts
    safetensors: bytes  # /v1/rollouts
    json_gzip_size: int  # bytes, as the server sent it
    safetensors_gzip_size: int  # bytes


def recorded(plain_url: str, our_url: str, tokens: int) -> Bodies:
    params = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 1.0}
    native = {"text": PROMPT, "sampling_params": {**params, "n": ANSWERS}, "return_logprob": True}
    ours = {"prompts": [PROMPT], "n": ANSWERS, "annealing": {}, "sampling_params": params}
    key = {"idempotency-key": str(time.time_ns())}  # the same answers in every form

    def rollouts(accept: str, encoding: str) -> httpx.Response:
        headers = {"accept": accept, "accept-encoding": encoding, **key}
        return _post(f"{our_url}/v1/rollouts", ours, headers)

    forms = (media_types.JSON, media_types.SAFETENSORS)
    return Bodies(
        _post(f"{plain_url}/generate", native, {}).content,
        *(rollouts(form, "identity").content for form in forms),
        *(rollouts(form, "gzip").num_bytes_downloaded for form in forms),
    )


def _post(url: str, body: Json, headers: dict[str, str]) -> httpx.Response:
    response = httpx.post(url, json=body, headers=headers, timeout=600)
    response.raise_for_status()
    return response


# --- the big case ------------------------------------------------------------------------------


class BigCase(NamedTuple):
    """64 x 16 x 1024 tokens of recorded shapes."""

    native: bytes
    ours: bytes
    ours_without_text: bytes  # `texts: false`


def big_case(bodies: Bodies, vocabulary: int) -> BigCase:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(models.resolve("smollm2"))
    numbers = np.random.default_rng(0)
    token_ids = numbers.integers(0, vocabulary, SHAPE).astype(np.int32)
    group = orjson.loads(bodies.json)["groups"][0]
    seen = np.ravel([answer["model_logprobs"] for answer in group["answers"]])
    logprobs, model_logprobs = (
        (numbers.choice(seen, SHAPE) * numbers.uniform(0.5, 1.5, SHAPE)).astype(np.float32)
        for _ in range(2)
    )
    texts = [tokenizer.batch_decode(ids % len(tokenizer)) for ids in token_ids]
    no_texts = [[None] * ANSWERS] * PROMPTS
    return BigCase(
        _native(orjson.loads(bodies.native)[0], texts, token_ids, logprobs),
        _packed(group, texts, token_ids, logprobs, model_logprobs),
        _packed(group, no_texts, token_ids, logprobs, model_logprobs),
    )


def _native(answer: Json, texts: Any, token_ids: Column, logprobs: Column) -> bytes:
    """What /generate answers; answer: one of its own."""
    from sglang.srt.utils.json_response import dumps_json

    lists = zip(*(a.reshape(-1, TOKENS).tolist() for a in (token_ids, logprobs)), strict=True)
    answers = []
    for text, (ids, values) in zip(itertools.chain(*texts), lists, strict=True):
        meta = {
            **answer["meta_info"],
            "completion_tokens": TOKENS,
            "output_token_logprobs": [
                (value, i, None) for value, i in zip(values, ids, strict=True)
            ],
            "output_token_logprobs_length": TOKENS,
        }
        answers.append({**answer, "text": text, "output_ids": ids, "meta_info": meta})
    return dumps_json(answers)


def _packed(
    group: Json, texts: Any, token_ids: Column, logprobs: Column, model_logprobs: Column
) -> bytes:
    """What /v1/rollouts answers as safetensors; group: one of its own, from JSON."""
    schedule = parse_annealing(group["annealing"])
    temperatures = schedule.temperatures(torch.arange(TOKENS)).float().numpy()
    groups = []
    for g in range(PROMPTS):
        groups.append(Group(g, Prompt.model_validate({"text": PROMPT}), ANSWERS, {}))
        groups[g].prompt_token_ids = np.asarray(group["prompt_token_ids"], np.int32)
        groups[g].answers = [
            {
                **{k: v for k, v in group["answers"][0].items() if k != "index"},
                "annealing": group["annealing"],
                "sampling": group["sampling"],
                "text": texts[g][n],
                "token_ids": token_ids[g, n],
                "temperatures": temperatures,
                "logprobs": logprobs[g, n],
                "model_logprobs": model_logprobs[g, n],
            }
            for n in range(ANSWERS)
        ]
    return packing.pack(groups, {"object": "rollouts", "id": "rollouts-0", "model": "m"})


# --- reading -----------------------------------------------------------------------------------


def read_native(loads: Callable[[bytes], Any], body: bytes) -> list[tuple[Column, Column]]:
    """Token ids and log-probabilities of each of SGLang's answers."""
    return [
        (
            np.array(answer["output_ids"], np.int32),
            np.array([one[0] for one in answer["meta_info"]["output_token_logprobs"]], np.float32),
        )
        for answer in loads(body)
    ]


def milliseconds(read: Callable[[bytes], Any], body: bytes) -> float:
    """Without garbage collection, which JSON's million small lists would call again and again."""
    gc.collect()
    gc.disable()
    try:
        started = time.perf_counter()
        result = read(body)
        taken = time.perf_counter() - started
        del result
    finally:
        gc.enable()
    return taken * 1e3
