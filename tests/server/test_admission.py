"""What a request may say: empty stops, seeds of several answers, lengths, nulls, grammars."""

from __future__ import annotations

import json
from typing import Any

import httpx
import numpy as np
import pytest

from ead_sampler.in_tokenizer.answer_seeds import seed_each_answer
from ead_server.edge import grammars
from ead_server.edge.stop_regex import check_stops
from ead_server.errors import LimitExceeded
from ead_server.launch.process import ServerProcess
from ead_server.rollouts.job import Group, Job
from ead_server.rollouts.kept_jobs import KeptJobs
from ead_server.rollouts.request import Prompt

CHAT, COMPLETE, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
ROLLOUTS = "/v1/rollouts"


def body_of(path: str, *, n: int = 1, max_tokens: int = 8, **fields: Any) -> dict[str, Any]:
    """The same request in the words of a route. fields: sampling parameters."""
    if path == CHAT:
        messages = [{"role": "user", "content": "What is 2+3?"}]
        return {"model": "m", "messages": messages, "n": n, "max_tokens": max_tokens, **fields}
    if path == COMPLETE:
        return {"model": "m", "prompt": "x = ", "n": n, "max_tokens": max_tokens, **fields}
    params = {"max_new_tokens": max_tokens, **fields}
    if path == GENERATE:
        return {"text": "x = ", "sampling_params": {**params, "n": n}}
    return {"prompts": ["x = "], "n": n, "sampling_params": params}


def send(server: ServerProcess, path: str, body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=120)


def ids_of(path: str, answer: httpx.Response) -> list[list[int]]:
    """Token ids of each answer."""
    assert answer.status_code == 200, answer.text
    content = answer.json()
    if path in (CHAT, COMPLETE):
        return [choice["rollout"]["token_ids"] for choice in content["choices"]]
    if path == GENERATE:
        return [a["output_ids"] for a in (content if isinstance(content, list) else [content])]
    return [a["token_ids"] for group in content["groups"] for a in group["answers"]]


@pytest.mark.parametrize("path", [CHAT, COMPLETE, GENERATE, ROLLOUTS])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop", ""),
        ("stop", [""]),
        ("stop", ["a", ""]),
        ("stop_regex", ""),
        ("stop_regex", ["a", ""]),
        ("stop_regex", "a*"),
        ("stop_regex", "(?:x|)"),
        ("stop_regex", "$"),
    ],
)
def test_a_stop_that_every_text_has_is_refused(
    server: ServerProcess, path: str, field: str, value: Any
) -> None:
    """It would end each answer at its first token."""
    answer = send(server, path, body_of(path, **{field: value}))
    if path == ROLLOUTS:
        (group,) = answer.json()["groups"]
        error = group["answers"][0]["error"]
        assert error["code"] == 400
    else:
        assert answer.status_code == 400
        error = answer.json()["error"]
    assert field in error["message"]
    assert "empty" in error["message"]


@pytest.mark.parametrize("path", [CHAT, COMPLETE, GENERATE])
@pytest.mark.parametrize("annealed", [True, False])
def test_a_seed_gives_n_answers_and_the_same_each_time(
    server: ServerProcess, path: str, annealed: bool
) -> None:
    """A schedule brings the seed to the sampler; `rollout` does without one."""
    seed = {"sampling_seed" if path == GENERATE else "seed": 7}
    ours = {"annealing": {}} if annealed else {"rollout": True}
    body = body_of(path, n=4, max_tokens=12, ignore_eos=True, **seed, **ours)
    first, again = (ids_of(path, send(server, path, body)) for _ in range(2))
    assert first == again
    assert len({tuple(ids) for ids in first}) == 4  # four alike of 12 tokens by chance: below 1e-9
    alone = body_of(path, n=1, max_tokens=12, ignore_eos=True, **seed, **ours)
    assert ids_of(path, send(server, path, alone)) == first[:1]


def test_prompts_of_one_call_have_seeds_of_their_own(server: ServerProcess) -> None:
    body = body_of(COMPLETE, n=2, max_tokens=12, ignore_eos=True, seed=7, annealing={})
    body["prompt"] = ["x = ", "x = ", "x = "]
    first, again = (ids_of(COMPLETE, send(server, COMPLETE, body)) for _ in range(2))
    assert first == again
    assert len({tuple(ids) for ids in first}) == 6
    streamed = {**body, "stream": True}
    with httpx.stream("POST", server.url + COMPLETE, json=streamed, timeout=120) as answer:
        events = [line[6:] for line in answer.iter_lines() if line.startswith("data: {")]
    got: dict[int, list[int]] = {}
    for event in events:
        for choice in json.loads(event)["choices"]:
            got.setdefault(choice["index"], []).extend(
                choice.get("rollout", {}).get("token_ids", ())
            )
    assert [got[index] for index in range(6)] == first


def test_seeds_count_up_within_64_bits() -> None:
    from sglang.srt.managers.io_struct import GenerateReqInput

    asked = GenerateReqInput(
        text="x", sampling_params={"sampling_seed": 2**63 - 1, "n": 2}, return_logprob=True
    )
    params = seed_each_answer(asked)
    assert params is not None
    assert [p["sampling_seed"] for p in params] == [2**63 - 1, -(2**63)]
    assert (asked.text, asked.return_logprob) == (["x", "x"], True)
    own = [{"sampling_seed": 5, "n": 2}, {"sampling_seed": 9, "n": 2}]
    asked = GenerateReqInput(
        input_ids=[[1], [2]], sampling_params=own, top_logprobs_num=[1, 2], token_ids_logprob=[3, 4]
    )
    params = seed_each_answer(asked)
    assert params is not None
    assert [p["sampling_seed"] for p in params] == [5, 6, 9, 10]
    assert asked.input_ids == [[1], [1], [2], [2]]
    assert (asked.top_logprobs_num, asked.token_ids_logprob) == ([1, 1, 2, 2], [3, 4])
    for nothing in ({"n": 3}, {"sampling_seed": 1}, {"sampling_seed": "x", "n": 2}):
        assert seed_each_answer(GenerateReqInput(text="x", sampling_params=nothing)) is None
    unseeded = GenerateReqInput(text="x", sampling_params={"n": 2})
    params = seed_each_answer(unseeded, default=42)  # --enable-deterministic-inference
    assert [p["sampling_seed"] for p in params or ()] == [42, 43]


def test_without_a_length_an_answer_goes_on_to_the_end_of_the_context(
    server: ServerProcess,
) -> None:
    """README: nothing is truncated unless told."""
    body = {"prompts": [{"token_ids": [5] * 3_900}], "sampling_params": {"ignore_eos": True}}
    (ids,) = ids_of(ROLLOUTS, send(server, ROLLOUTS, body))
    assert 4_096 - 3_900 - 2 <= len(ids) <= 4_096 - 3_900


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, ("n", "stream", "logprobs", "frequency_penalty", "presence_penalty", "top_p")),
        (CHAT, ("temperature", "max_tokens", "stop", "seed", "tools", "stream_options", "user")),
        (CHAT, ("response_format", "logit_bias", "parallel_tool_calls", "top_logprobs")),
        (COMPLETE, ("temperature", "top_p", "max_tokens", "n", "stream", "echo", "suffix")),
        (COMPLETE, ("frequency_penalty", "presence_penalty", "logprobs", "stop", "seed")),
        (COMPLETE, ("best_of", "logit_bias", "stream_options", "user")),
    ],
)
def test_null_is_as_absent_where_openai_allows_it(
    server: ServerProcess, path: str, fields: tuple[str, ...]
) -> None:
    for field in fields:
        body = {**body_of(path, max_tokens=3), field: None}
        answer = send(server, path, body)
        assert answer.status_code == 200, (field, answer.text)
    tool = {"type": "function", "function": {"name": "f", "description": None, "strict": None}}
    if path == CHAT:
        answer = send(server, path, {**body_of(path, max_tokens=3), "tools": [tool]})
        assert answer.status_code == 200, answer.text


# --- grammars -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"anyOf": [{"$ref": "#"}]},
        {"allOf": [{"$ref": "#"}]},
        {"enum": []},
        False,
        {"type": "integer", "minimum": 5, "maximum": 1},
        {"type": "string", "minLength": 5, "maxLength": 1},
        {"type": "object", "properties": {"a": False}, "required": ["a"]},
    ],
    ids=json.dumps,
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_nothing_fits_is_the_request_s_own_mistake(
    server: ServerProcess, schema: Any, stream: bool
) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {**body_of(CHAT), "response_format": wanted, "stream": stream}
    answer = send(server, CHAT, body)
    if stream and answer.status_code == 200:
        events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
        error = next(json.loads(e)["error"] for e in events if "error" in json.loads(e))
        assert error["code"] == 400
    else:
        assert answer.status_code == 400, answer.text
    assert send(server, CHAT, body_of(CHAT)).status_code == 200


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("ebnf", "root ::= root"),
        ("ebnf", 'root ::= "a" b\nb ::= b'),
    ],
)
def test_so_is_a_grammar_that_lets_no_token_follow(
    server: ServerProcess, kind: str, text: str
) -> None:
    """Others in the same batch go on."""
    both = {
        "text": ["x = ", "x = "],
        "sampling_params": [
            {"max_new_tokens": 8, kind: text},
            {"max_new_tokens": 8, "ignore_eos": True},
        ],
    }
    alone = send(server, GENERATE, body_of(GENERATE, **{kind: text}))
    assert alone.status_code == 400, alone.text
    assert send(server, GENERATE, both).status_code == 400
    other = send(server, GENERATE, body_of(GENERATE, ignore_eos=True)).json()
    assert other["meta_info"]["completion_tokens"] == 8


def test_a_grammar_that_takes_too_long_ends_its_own_request(server: ServerProcess) -> None:
    """It has half a second of the scheduler, whatever the machine."""
    body = body_of(GENERATE, max_tokens=400, regex="(([a-z]{1,30} ?){1,30}x?){1,30}y")
    answer = send(server, GENERATE, body)
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        assert "takes too long" in answer.json()["error"]["message"]


class Slow:
    """A grammar that takes a second of processor time for a token."""

    seconds = 1.0

    def fill(self, vocab_mask: Any, idx: int) -> None:
        import time

        until = time.thread_time() + self.seconds
        while time.thread_time() < until:
            pass
        vocab_mask[idx] = 1


def test_the_time_of_a_grammar_is_counted() -> None:
    import torch

    grammar, mask = Slow(), torch.zeros(1, 4, dtype=torch.int32)
    grammars.fill_vocab_mask(Slow.fill, grammar, mask, 0)
    with pytest.raises(ValueError, match="takes too long"):
        grammars.accept_token(lambda *_: None, grammar, 1)
    usual = Slow()
    usual.seconds = 0.0
    for _ in range(1_000):
        grammars.fill_vocab_mask(Slow.fill, usual, mask, 0)
    grammars.accept_token(lambda *_: None, usual, 1)


def test_grammars_have_bounds() -> None:
    for params in (
        {"json_schema": json.dumps({"enum": ["x" * 70_000]})},
        {"json_schema": "[" * 65 + "]" * 65},
        {"json_schema": json.dumps({"enum": [{}] * 5_000})},
        {"json_schema": "{"},
        {"structural_tag": json.dumps([{"maxLength": 1}] * 33)},
        {"regex": "(" * 65 + ")" * 65},
        {"ebnf": "x" * 70_000},
    ):
        with pytest.raises(LimitExceeded):
            grammars.check(params)
    grammars.check({"json_schema": "", "regex": None, "ebnf": 'root ::= "[[["'})


def test_compiled_grammars_are_forgotten() -> None:
    class Backend:
        def __init__(self) -> None:
            self.cache = {number: number for number in range(grammars.MAX_KEPT + 5)}

    backend = Backend()
    grammars.forget_oldest(None, backend, "k", "v")
    assert list(backend.cache) == list(range(5, grammars.MAX_KEPT + 5))


# --- stop expressions -----------------------------------------------------------------------------


class Req:
    """SGLang's request, as far as stops read it; a token is a character."""

    def __init__(self, text: str, *patterns: str) -> None:
        class Params:
            stop_strs: tuple[str, ...] = ()
            stop_str_max_len = 0
            stop_regex_strs = patterns
            stop_regex_max_len = 1 << 30
            custom_params = None

        class Tokenizer:
            def decode(self, ids: list[int]) -> str:
                return "".join(map(chr, ids))

        self.sampling_params, self.tokenizer = Params(), Tokenizer()
        self.output_ids = [ord(character) for character in text]
        self.finished_reason: Any = None
        self.finished_len: int | None = None


@pytest.mark.parametrize(
    ("text", "accepted", "length"),
    [("abc", 1, 3), ("abcd", 2, 3), ("abcde", 1, 5), ("ab", 1, None), ("xabcxx", 4, 4)],
)
def test_a_stop_expression_ends_an_answer_where_it_is_found(
    text: str, accepted: int, length: int | None
) -> None:
    req = Req(text, "zzz", "ab+c")
    found = check_stops(lambda *_: False, req, accepted)
    assert (found, req.finished_len) == (length is not None, length)
    assert list(req.sampling_params.stop_regex_strs) == ["zzz", "ab+c"]


@pytest.mark.parametrize("pattern", [r"\w*\w*\w*\d", r"(?:\w|\w)*\d"])
def test_one_that_takes_too_long_ends_its_own_request(pattern: str) -> None:
    req = Req("a" * 5_000, pattern)
    assert not check_stops(lambda *_: False, req)
    said = req.finished_reason.to_json()
    assert said["status_code"] == 400
    assert "stop_regex" in said["message"]


# --- jobs that are asked for again ---------------------------------------------------------------


def test_kept_jobs_are_bounded_in_bytes() -> None:
    import asyncio

    async def run() -> tuple[list[str], bool]:
        kept = KeptJobs(max_bytes=1_000_000)
        for number in range(5):

            class Done(Group):
                async def run(self, engine: Any) -> Group:
                    self.answers = [{"error": None, "logprobs": np.zeros(100_000, np.float32)}]
                    return self

            group = Done(0, Prompt(text="x"), 1, {})
            job = Job([group], None, "m")  # type: ignore[arg-type]
            kept.keep(str(number), b"", job)
            await job.wait()
            await asyncio.sleep(0)
        return list(kept._jobs), kept.find("4", b"") is not None

    keys, found = asyncio.run(run())
    assert keys == ["3", "4"]  # of 400,000 bytes each
    assert found
