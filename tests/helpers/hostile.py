"""Requests that nobody should send, and that must cost next to nothing.

Every route that takes a body, and every field that holds a text, a list or an object. Bodies are
made when they are asked for: many have tens of megabytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import orjson

MB = 1 << 20
CHAT, COMPLETE, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
ROLLOUTS, TOKENIZE, DETOKENIZE = "/v1/rollouts", "/tokenize", "/detokenize"


class Hostile(NamedTuple):
    """One of them. statuses: what it may be answered with."""

    name: str
    path: str
    body: Callable[[], bytes]
    statuses: tuple[int, ...] = (400, 413, 415, 422)


def _chat(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2, **fields}


def _complete(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": "x", "max_tokens": 2, **fields}


def _native(**params: Any) -> dict[str, Any]:
    return {"text": "x", "sampling_params": {"max_new_tokens": 2, **params}}


def _rollouts(prompts: Any, **fields: Any) -> dict[str, Any]:
    return {"prompts": prompts, "sampling_params": {"max_new_tokens": 2}, **fields}


def _nested(depth: int) -> str:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return json.dumps(schema)  # orjson goes 254 deep


def _format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def _of(value: Callable[[], Any]) -> Callable[[], bytes]:
    return lambda: orjson.dumps(value())


def _list(item: bytes, size: int = 30 * MB) -> bytes:
    return b"[" + b",".join([item] * (size // (len(item) + 1))) + b"]"


def _in(path: str, field: str, item: bytes) -> Hostile:
    """A list of 30 MB in a field of a body that is right but for it."""
    bodies: dict[str, dict[str, Any]] = {
        CHAT: _chat(),
        COMPLETE: _complete(),
        GENERATE: {"text": "x"},
        ROLLOUTS: {"prompts": ["x"]},
        TOKENIZE: {"prompt": "x"},
        DETOKENIZE: {"tokens": [1]},
    }
    rest = {k: v for k, v in bodies.get(path, {}).items() if k != field}

    def body() -> bytes:
        head = orjson.dumps(rest)[:-1]
        return head + (b"," if rest else b"") + b'"%b":' % field.encode() + _list(item) + b"}"

    return Hostile(f"{path} {field} [{item.decode()}, ...]", path, body)


def table() -> Iterator[Hostile]:
    """All of them."""
    text = "word " * (6 * MB)
    # texts that cannot fit
    yield Hostile("a text of 30 MB", GENERATE, _of(lambda: {"text": text}))
    yield Hostile("texts of 1 MB", GENERATE, _of(lambda: {"text": [text[:MB]] * 20}))
    yield Hostile("a prompt of 30 MB", COMPLETE, _of(lambda: _complete(prompt=text)))
    yield Hostile("prompts of 1 MB", COMPLETE, _of(lambda: _complete(prompt=[text[:MB]] * 20)))
    yield Hostile("a suffix of 30 MB", COMPLETE, _of(lambda: _complete(suffix=text)))
    yield Hostile("no spaces", COMPLETE, _of(lambda: _complete(prompt="x" * 30 * MB)))
    yield Hostile("emoji", COMPLETE, _of(lambda: _complete(prompt="😀" * 7 * MB)))
    message = {"role": "user", "content": text}
    yield Hostile("a message of 30 MB", CHAT, _of(lambda: _chat(messages=[message])))
    parts = [{"type": "text", "text": "x" * 1000}] * 15_000
    yield Hostile(
        "many long parts", CHAT, _of(lambda: _chat(messages=[{"role": "user", "content": parts}]))
    )
    yield Hostile("a rollout's text", ROLLOUTS, _of(lambda: _rollouts([text])), (200,))
    yield Hostile(
        "a rollout's message", ROLLOUTS, _of(lambda: _rollouts([{"messages": [message]}])), (200,)
    )
    yield Hostile("text to tokens", TOKENIZE, _of(lambda: {"prompt": text}))
    yield Hostile(
        "texts to tokens", TOKENIZE, _of(lambda: {"prompt": ["word " * 1000] * 6000}), (200, 400)
    )
    yield Hostile("messages to tokens", TOKENIZE, _of(lambda: {"messages": [message]}))
    for path in ("/v1/embeddings", "/v1/classify"):
        yield Hostile(f"{path} text", path, _of(lambda: {"model": "m", "input": text}))
    yield Hostile(
        "/v1/score",
        "/v1/score",
        _of(lambda: {"query": text, "items": ["b"], "label_token_ids": [1], "model": "m"}),
    )
    yield Hostile(
        "/v1/rerank", "/v1/rerank", _of(lambda: {"query": "a", "documents": [text], "model": "m"})
    )
    claude = {"model": "m", "max_tokens": 2}
    yield Hostile("/v1/messages", "/v1/messages", _of(lambda: {**claude, "messages": [message]}))
    yield Hostile(
        "/v1/messages system",
        "/v1/messages",
        _of(lambda: {**claude, "messages": [{"role": "user", "content": "x"}], "system": text}),
    )
    yield Hostile(
        "/v1/messages/count_tokens",
        "/v1/messages/count_tokens",
        _of(lambda: {**claude, "messages": [message]}),
    )
    yield Hostile("/v1/responses", "/v1/responses", _of(lambda: {"model": "m", "input": text}))
    yield Hostile("/api/generate", "/api/generate", _of(lambda: {"model": "m", "prompt": text}))
    yield Hostile("/api/chat", "/api/chat", _of(lambda: {"model": "m", "messages": [message]}))
    yield Hostile(
        "/vertex_generate", "/vertex_generate", _of(lambda: {"instances": [{"text": text}]})
    )
    # many small things
    small = (b"{}", b"[]", b'""', b"1", b'"x"', b"null", b'{"a":1}')
    for path, field in (
        (CHAT, "messages"),
        (COMPLETE, "prompt"),
        (GENERATE, "text"),
        (GENERATE, "input_ids"),
        (ROLLOUTS, "prompts"),
    ):
        for item in small:
            yield _in(path, field, item)
    yield _in(CHAT, "messages", b'{"role":"user","content":"x"}')
    yield _in(CHAT, "tools", b'{"type":"function","function":{"name":"f"}}')
    yield _in(CHAT, "stop", b'"x"')
    yield _in(CHAT, "unknown", b"{}")
    yield _in(CHAT, "metadata", b"{}")
    yield _in(GENERATE, "sampling_params", b"{}")
    yield _in(GENERATE, "image_data", b'"x"')
    yield _in(GENERATE, "lora_path", b'"x"')
    yield _in(GENERATE, "token_ids_logprob", b"1")
    yield _in(ROLLOUTS, "prompts", b'{"text":"x"}')
    yield _in(ROLLOUTS, "prompts", b"[1]")
    yield _in(TOKENIZE, "prompt", b'"x"')
    yield _in(TOKENIZE, "messages", b"{}")
    yield _in(DETOKENIZE, "tokens", b"1")
    yield _in(DETOKENIZE, "tokens", b"[1]")
    yield _in("/v1/annealing/step", "step", b"1")
    yield Hostile(
        "empty content parts",
        ROLLOUTS,
        lambda: (
            b'{"prompts":[{"messages":[{"role":"user","content":'
            + _list(b"{}", 24 << 10)
            + b"}]}]}"
        ),
        (200,),
    )
    yield Hostile(
        "empty content parts in a chat",
        CHAT,
        lambda: (
            b'{"model":"m","messages":[{"role":"user","content":' + _list(b"{}", 40_000) + b"}]}"
        ),
    )
    yield Hostile(
        "many keys",
        CHAT,
        _of(lambda: {**_chat(), **{f"k{i}": 1 for i in range(1_500_000)}}),
    )
    yield Hostile(
        "token ids of one prompt",
        ROLLOUTS,
        lambda: b'{"prompts":[' + _list(b"1") + b"]}",
        (200, 400),
    )
    # limits of fields
    yield Hostile(
        "logit_bias", CHAT, _of(lambda: _chat(logit_bias={str(i): 1 for i in range(50_000)}))
    )
    yield Hostile("deep", CHAT, lambda: b"[" * 15 * MB + b"]" * 15 * MB)
    yield Hostile("deep objects", CHAT, lambda: b'{"a":' * 5 * MB + b"1" + b"}" * 5 * MB)
    yield Hostile("backslashes", CHAT, lambda: b'"' + b"\\" * 30 * MB + b'"')
    yield Hostile("quotes", CHAT, lambda: b'"' * 30 * MB)
    yield Hostile("a long number", CHAT, lambda: b'{"seed":' + b"1" * 30 * MB + b"}")
    yield Hostile("a long key", CHAT, lambda: b'{"' + b"k" * 30 * MB + b'":1}')
    # grammars
    for kind in ("regex", "ebnf", "json_schema", "structural_tag"):
        yield Hostile(f"{kind} of 1 MB", GENERATE, _of(lambda k=kind: _native(**{k: "(" * MB})))
    yield Hostile("nested schema", GENERATE, _of(lambda: _native(json_schema=_nested(450))))
    yield Hostile(
        "nested schema in a chat",
        CHAT,
        _of(lambda: _chat(response_format=_format(json.loads(_nested(40))))),
    )
    many = {f"k{i}": {"type": "string", "maxLength": i + 1} for i in range(500)}
    yield Hostile(
        "many bounded strings",
        CHAT,
        _of(lambda: _chat(response_format=_format({"type": "object", "properties": many}))),
    )
    words = {"enum": [f"word{i}" for i in range(100_000)]}
    yield Hostile("a long enum", CHAT, _of(lambda: _chat(response_format=_format(words))))
    yield Hostile(
        "nested repeats",
        GENERATE,
        _of(lambda: {**_native(regex="([a-z]{1,30}){1,30}", max_new_tokens=200)}),
        (200, 400),
    )
    # stop expressions, which the scheduler looks for after every token
    for pattern in (r"\w*\d", r".*.{0,8}X", r"(?:.{1,9}.*)X", "(a+)+$", "(.|.)*x", "a*"):
        params = {"stop_regex": pattern, "max_new_tokens": 300, "ignore_eos": True}
        yield Hostile(
            f"stop_regex {pattern}", GENERATE, _of(lambda p=params: _native(**p)), (200, 400)
        )
    # schedules
    strings = [f"{i:0>99}" for i in range(16)]
    segment = {
        "schedule": "segment",
        "thinking": {"schedule": "ead"},
        "restart_strings": strings,
    }
    yield Hostile(
        "strings that mark tokens",
        GENERATE,
        _of(
            lambda: {
                "text": ["x"] * 3000,
                "sampling_params": [
                    {
                        "annealing": {
                            **segment,
                            "restart_strings": [f"{i}-{j}" for j in range(16)],
                        }
                    }
                    for i in range(3000)
                ],
            }
        ),
    )
    yield Hostile(
        "means over many tokens",
        GENERATE,
        _of(
            lambda: {
                "text": ["x"] * 3000,
                "sampling_params": [
                    {"annealing": {"mean_matched": {"temperature": 0.7, "tokens": 100_000 - i}}}
                    for i in range(3000)
                ],
            }
        ),
    )
    yield Hostile(
        "a schedule with many keys",
        CHAT,
        _of(lambda: _chat(annealing={f"k{i}": i for i in range(40_000)})),
    )
    yield Hostile(
        "many knots",
        CHAT,
        _of(
            lambda: _chat(
                annealing={"schedule": "piecewise", "knots": [[i, 1.0] for i in range(15_000)]}
            )
        ),
    )
