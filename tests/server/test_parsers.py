"""SGLang's reasoning and tool parsers beside our fields: what they make of an answer's text is what
the tokens say, and the arrays have every token, thought and markup included.

The tiny model writes at random, so a grammar writes for it what the parsers look for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
import torch
from helpers.reference import TINY_FLAGS, Reference
from helpers.serving import FAST, LOGPROB_TOLERANCE, expected_temperatures
from helpers.shapes import shape

from ead_client import Rollout
from ead_server.launch.process import ServerProcess

WEATHER = {
    "name": "get_weather",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome", "Oslo"]}, "days": {"type": "boolean"}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}
CALL = (
    r'\{"name": "get_weather", "arguments": \{"city": "(Paris|Rome|Oslo)", "days": (true|false)\}\}'
)
BODY = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 400,
    "n": 2,
    # or SGLang's grammars begin only after the model has closed its thinking, which this one won't
    "chat_template_kwargs": {"enable_thinking": False},
}
END = "2"  # the end-of-sequence token
CASES: dict[str, dict[str, Any]] = {
    "thinking, then a call": {
        "tools": [{"type": "function", "function": WEATHER}],
        "regex": rf"<think>[a-z ]{{10,30}}</think>[A-Z]{{3,9}}<tool_call>\n{CALL}\n</tool_call>",
    },
    "a call that is required": {
        "tools": [{"type": "function", "function": WEATHER}],
        "tool_choice": "required",
    },
    "thinking, then an answer": {"regex": r"<think>[a-z ]{10,30}</think>[A-Z ]{10,20}"},
    "thinking that is cut off": {
        "chat_template_kwargs": {},
        "max_tokens": 20,
        "ignore_eos": True,
        "logit_bias": None,
    },
    "an answer after a schema": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "weather", "schema": WEATHER["parameters"]},
        }
    },
}


class Parsed(NamedTuple):
    """One choice, as SGLang parsed it."""

    reasoning: str
    content: str
    calls: list[dict[str, Any]]  # name and arguments
    finish_reason: str


@pytest.fixture(scope="module")
def parsing(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    arguments = ["--model-path", str(tiny_model), *TINY_FLAGS]
    arguments += ["--reasoning-parser", "qwen3", "--tool-call-parser", "qwen25"]
    log = tmp_path_factory.mktemp("parsing") / "server.log"
    with ServerProcess(arguments, log) as process:
        process.wait_until_ready()
        yield process


def expected(case: str, text: str) -> Parsed:
    """What is in the text, by its form alone."""
    if case == "thinking that is cut off":
        return Parsed(text, "", [], "length")
    thinks = re.match(r"<think>(.*)</think>", text)
    reasoning = thinks[1] if thinks else ""
    rest = text[thinks.end() :] if thinks else text
    content, _, markup = rest.partition("<tool_call>")
    call = json.loads(markup.removesuffix("</tool_call>")) if markup else None
    return Parsed(reasoning, content, [call] if call else [], "tool_calls" if call else "stop")


def whole(answer: dict[str, Any]) -> tuple[list[Parsed], list[Any]]:
    """What was parsed, and the rollouts, by choice."""
    parsed = []
    for choice in answer["choices"]:
        message = choice["message"]
        calls = [
            {"name": c["function"]["name"], "arguments": json.loads(c["function"]["arguments"])}
            for c in message.get("tool_calls") or ()
        ]
        reasoning, content = message.get("reasoning_content") or "", message.get("content") or ""
        parsed.append(Parsed(reasoning, content, calls, choice["finish_reason"]))
    return parsed, [choice.get("rollout") for choice in answer["choices"]]


def streamed(chunks: list[dict[str, Any]]) -> tuple[list[Parsed], list[Any]]:
    """The same of a stream."""
    texts = [{"reasoning_content": "", "content": ""} for _ in range(2)]
    calls: list[dict[int, dict[str, str]]] = [{}, {}]
    reasons = ["", ""]
    rollouts: list[Any] = [None, None]
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        index, delta = choice["index"], choice["delta"]
        for name in texts[index]:
            texts[index][name] += delta.get(name) or ""
        for call in delta.get("tool_calls") or ():
            made = calls[index].setdefault(call["index"], {"name": "", "arguments": ""})
            for name in made:
                made[name] += call["function"].get(name) or ""
        reasons[index] = choice["finish_reason"] or reasons[index]
        if "rollout" in choice:
            before, now = rollouts[index] or {}, choice["rollout"]
            added = {k: before.get(k, []) + v for k, v in now.items() if k in COLUMNS}
            rollouts[index] = {**now, **added}
    parsed = [
        Parsed(
            texts[i]["reasoning_content"],
            texts[i]["content"],
            [{**c, "arguments": json.loads(c["arguments"])} for c in calls[i].values()],
            reasons[i],
        )
        for i in range(2)
    ]
    return parsed, rollouts


COLUMNS = ("token_ids", "temperatures", "logprobs", "model_logprobs")


def ask(server: ServerProcess, body: dict[str, Any]) -> Any:
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    if not body["stream"]:
        return response.json()
    *events, done = [line for line in response.text.split("\n\n") if line]
    assert done == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_parsed_is_in_the_tokens_and_the_arrays_have_them_all(
    parsing: ServerProcess, reference: Reference, case: str, stream: bool
) -> None:
    # where a grammar lets it: no white space, which at random goes on and on, and an end
    blank = [i for i in range(len(reference.tokenizer)) if reference.tokenizer.decode(i).isspace()]
    bias = {**dict.fromkeys(map(str, blank), -100), END: 100}
    body = {**BODY, "logit_bias": bias, **CASES[case], "stream": stream}
    answer = ask(parsing, {**body, "annealing": FAST})
    parsed, rollouts = (streamed if stream else whole)(answer)
    for got, raw in zip(parsed, rollouts, strict=True):
        rollout = Rollout.model_validate(raw)
        text = reference.tokenizer.decode(rollout.token_ids, skip_special_tokens=True)
        assert got == expected(case, text)
        want = expected_temperatures(FAST, len(rollout))
        assert np.abs(rollout.temperatures - want).max() < 1e-6
        logits = reference.logits(rollout.prompt_token_ids, rollout.token_ids)
        chosen = torch.from_numpy(rollout.token_ids).unsqueeze(1)
        model = logits.log_softmax(-1).gather(1, chosen).squeeze(1).numpy()
        assert np.abs(rollout.model_logprobs - model).max() < LOGPROB_TOLERANCE

    plain = ask(parsing, body)
    plain_parsed, nothing = (streamed if stream else whole)(plain)
    assert nothing == [None, None]
    for got, annealed in zip(plain_parsed, parsed, strict=True):
        assert shape(got._asdict()) == shape(annealed._asdict())
        assert got.finish_reason == annealed.finish_reason
        assert bool(got.reasoning) == bool(annealed.reasoning)
        assert bool(got.content) == bool(annealed.content)
    if not stream:
        for choice in answer["choices"]:
            del choice["rollout"]
        del plain["metadata"]["weight_versions"]  # in each rollout instead
        assert shape(answer) == shape(plain)
