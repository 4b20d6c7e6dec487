"""Requests that nobody would send: no 5xx, no stack trace, and a server that is alive and exact
afterwards.

Two makers of them: schemathesis, from the server's own description of its routes, which it holds
the answers against; and random changes of valid bodies, raw bytes among them.

More of them: `make fuzz`, or EAD_FUZZ_SCALE=10 and EAD_FUZZ_SEED=1, 2, ...; -s prints the counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import hypothesis
import pytest
import requests
import schemathesis
from helpers.guarded import ADMIN_ROUTES
from helpers.reference import Reference
from helpers.rollout_calls import wait_until_idle
from helpers.serving import FAST, check_against_reference
from schemathesis.checks import load_all_checks
from schemathesis.config import SchemathesisConfig
from schemathesis.core.failures import FailureGroup
from schemathesis.generation.modes import GenerationMode
from schemathesis.specs.openapi import checks

from ead_client import Client
from ead_client._rollouts import FRAMES
from ead_server.launch.process import ServerProcess

SCALE = int(os.environ.get("EAD_FUZZ_SCALE", "1"))
SEED = int(os.environ.get("EAD_FUZZ_SEED", "0"))
SCHEDULES: list[Any] = [
    {"preset": "paper", "step": 3},
    {"schedule": "piecewise", "knots": [[0, 1.2], [9, 0.4]]},
    {"schedule": "branch", "top": 0.3},
    {
        "schedule": "segment",
        "thinking": {"schedule": "linear", "length": 9.0},
        "answer": {"schedule": "constant", "tau": 0.5},
        "end_of_thinking_token_ids": [2],
    },
]
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
NATIVE = {"max_new_tokens": 3, "stop": ["zz"], "top_p": 0.9}
ROUTES: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", "/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2, "n": 2}),
    ("POST", "/v1/completions", {"model": "m", "prompt": ["a", "b"], "max_tokens": 3, "n": 2}),
    ("POST", "/v1/completions", {"model": "m", "prompt": [5, 6], "max_tokens": 3, "stop": "x"}),
    ("POST", "/generate", {"text": "a", "sampling_params": NATIVE, "return_logprob": True}),
    ("POST", "/generate", {"input_ids": [[5], [6]], "sampling_params": NATIVE}),
    (
        "POST",
        "/v1/rollouts",
        {
            "prompts": ["a", [5, 6], {"text": "b", "n": 1, "prefix_token_ids": [7]}],
            "n": 2,
            "entropies": True,
            "sampling_params": NATIVE,
        },
    ),
    ("PUT", "/v1/annealing", {"annealing": None, "step": 2}),
    ("PUT", "/v1/annealing/step", {"step": 2}),
]
ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    1,
    0.5,
    10**6,
    2**31,
    2**63,
    10**30,
    1e308,
    -1e-9,
    "",
    "x",
    "\x00\ud7ff",
    "nan",
    "ead",
    "json_object",
    [],
    {},
    [[]],
    [None],
    [1, "a"],
    {"a": {"b": [1]}},
    ["s"] * 40,
    [[1, 2], [3, 4]],
]


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    if isinstance(value, (dict, list)):
        keys = value if isinstance(value, dict) else range(len(value))
        return [at, *(p for key in keys for p in places(value[key], (*at, key)))]
    return [at]


def changed(body: Any, draw: random.Random) -> Any:
    """The body with one place made odd, dropped, or another field added next to it."""
    *parents, last = draw.choice(places(body)[1:])
    parent = body
    for key in parents:
        parent = parent[key]
    what = draw.random()
    if what < 0.6:
        parent[last] = copy.deepcopy(draw.choice(ODD))
    elif what < 0.8:
        del parent[last]
    elif isinstance(parent, dict):
        name = draw.choice(["temperature", "top_k", "n", "stream", "rollout", "rid", "annealing"])
        parent[name] = copy.deepcopy(draw.choice(ODD))
    return body


def case(draw: random.Random) -> tuple[str, str, bytes]:
    method, path, body = copy.deepcopy(draw.choice(ROUTES))
    if path.startswith("/v1/annealing") is False and draw.random() < 0.6:
        schedule = copy.deepcopy(draw.choice(SCHEDULES))
        if path == "/generate":
            body["sampling_params"]["annealing"] = schedule
        else:
            body["annealing"] = schedule
    for _ in range(draw.randint(1, 3)):
        if len(places(body)) > 1:
            body = changed(body, draw)
    text = json.dumps(body).encode()
    if draw.random() < 0.1:  # not even JSON
        at = draw.randrange(len(text))
        junk = draw.choice([b"\x00", b"\xff\xfe", b"NaN", b"[" * 3000, b"", b"1e999", b'"'])
        text = text[:at] + junk + text[at + draw.randint(0, 3) :]
    return method, path, text


def told_wrong(status: int, text: str) -> bool:
    """Whether an answer blames the server, or shows its insides."""
    inside = r'Traceback|File \\*"|site-packages|"code": ?5\d\d'
    return status >= 500 or re.search(inside, text) is not None


@pytest.fixture(scope="module", autouse=True)
def sent(server: ServerProcess, client: Client, reference: Reference) -> Iterator[Counter[str]]:
    """How many requests each test sent. After all of them, the server is checked."""
    counts: Counter[str] = Counter()
    yield counts
    print("\nrequests sent:", dict(counts), "in all", counts.total())
    client.request("PUT", "/v1/annealing", {"annealing": None, "step": None}, admin=True)
    wait_until_idle(client)
    answer = client.rollouts(["def "], n=2, annealing=FAST, max_new_tokens=10, ignore_eos=True)
    for choice in answer.groups[0].answers:
        assert choice.rollout is not None
        check_against_reference(choice.rollout, reference)


# --- from the description of the API -----------------------------------------------------------


@schemathesis.serializer(FRAMES)
def as_it_is(context: Any, value: Any) -> bytes:
    """What schemathesis draws for a body of frames: bytes that are none, in whatever shape."""
    return value if isinstance(value, bytes) else json.dumps(value).encode()


@pytest.fixture(scope="module")
def described(server: ServerProcess) -> Any:
    """The server's own description, as schemathesis reads it."""
    document = httpx.get(f"{server.url}/openapi.json", timeout=60).json()
    # with all that SGLang says of these, schemathesis would take minutes over one case
    string, thing = {"type": "string"}, {"type": "object"}
    message = {
        "type": "object",
        "properties": {"role": {"enum": ["user", "system"]}, "content": string},
        "required": ["role", "content"],
    }
    simpler: dict[str, Any] = {
        "messages": {"type": "array", "items": message, "minItems": 1},
        "tools": {"type": "array", "items": thing},
        "tool_choice": {"anyOf": [string, thing]},
        "response_format": {"anyOf": [thing, {"type": "null"}]},
        "annealing": {"anyOf": [thing, {"type": "null"}]},
    }
    for name in ("ChatCompletionRequest", "CompletionRequest"):
        fields = document["components"]["schemas"][name]["properties"]
        fields.update({field: simpler[field] for field in simpler if field in fields})
    load_all_checks()
    config = SchemathesisConfig.from_dict(
        {
            "generation": {"allow-x00": True, "with-security-parameters": False},
            "checks": {"negative_data_rejection": {"expected-statuses": ["4xx"]}},
        }
    )
    schema = schemathesis.openapi.from_dict(document, config=config)
    schema.config.update(base_url=server.url)
    return schema


def cases(schema: Any) -> Iterator[Any]:
    """Cases of every operation of the schema: random ones, valid and not; of `make fuzz` also
    those at the limits of each field, one at a time."""
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in GenerationMode:
            if SCALE > 1:
                generation = schema.config.generation_for(operation=operation)
                yield from schema.iter_coverage_cases(
                    operation, generation_modes=[mode], generation_config=generation
                )
            yield from drawn(operation.as_strategy(generation_mode=mode), 12 * SCALE)


def drawn(strategy: Any, count: int) -> list[Any]:
    """What hypothesis draws; nothing where there is nothing to vary."""
    found: list[Any] = []

    @hypothesis.seed(SEED)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def draw(case: Any) -> None:
        found.append(case)

    with contextlib.suppress(hypothesis.errors.Unsatisfiable):
        draw()
    return found


# where a request says how many tokens it wants
LENGTHS = {
    "/generate": ("sampling_params", "max_new_tokens"),
    "/v1/rollouts": ("sampling_params", "max_new_tokens"),
    "/v1/completions": ("max_tokens",),
    "/v1/chat/completions": ("max_tokens",),
    "/invocations": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
}


MAX_URL = 64 << 10  # bytes: h11, uvicorn's parser here, answers 400 and cuts off what still comes


def send(case: Any, server: ServerProcess, *, admin: bool = True) -> Any:
    """The answer to the case, of which at most a few tokens are to be generated.

    None where the connection was cut off in the middle of a URL of more than MAX_URL.
    """
    *parents, name = LENGTHS.get(case.path, ("",))
    fields = case.body
    for parent in parents:
        fields = fields.setdefault(parent, {}) if isinstance(fields, dict) else None
    if name and isinstance(fields, dict) and type(fields.get(name, 99)) is int:
        fields[name] = min(fields.get(name, 99), 4)
    try:
        return case.call(headers=server.admin_headers if admin else {}, timeout=60)
    except requests.RequestException:
        query = requests.Request("GET", server.url, params=dict(case.query or {})).prepare().url
        if len(query or "") < MAX_URL:
            raise
        return None


def mistakes(
    schema: Any, server: ServerProcess, sent: Counter[str], check: Callable[[Any, Any], None]
) -> list[str]:
    """How to repeat the first few cases that do not pass the check."""
    wrong = []
    for case in cases(schema):
        answer = send(case, server)
        sent[case.operation.label] += 1
        if answer is None:
            continue
        try:
            assert not told_wrong(answer.status_code, answer.text)
            check(case, answer)
        except (AssertionError, FailureGroup) as error:
            wrong.append(f"{case.as_curl_command()}\n-> {answer.status_code} {error}"[:3000])
            if len(wrong) == 5:
                break
    return wrong


def enough(sent: Counter[str], count: int, *routes: str) -> None:
    """At least so many requests to each: a test that sends nothing finds nothing."""
    few = {route: sent[route] for route in routes if sent[route] < count}
    assert not few, f"fewer than {count}: {few}, of {dict(sent)}"


# What no schema can say: knots in order, a tau_min below its tau_max, a model's vocabulary. And the
# API key, which this server has not been given; test_guard.py has one with both.
NOT_CHECKED = [checks.positive_data_acceptance, checks.ignored_auth]


def test_our_routes_answer_as_described(
    described: Any, server: ServerProcess, sent: Counter[str]
) -> None:
    ours = described.include(path_regex="^/v1/(annealing|rollouts)|^/health/(live|ready)$")

    def check(case: Any, answer: Any) -> None:
        case.validate_response(answer, excluded_checks=NOT_CHECKED)

    assert not (wrong := mistakes(ours, server, sent, check)), "\n\n".join(wrong)
    bodies = ("POST /v1/rollouts", "PUT /v1/annealing", "PUT /v1/annealing/step")
    enough(sent, 10 * SCALE, *bodies)
    enough(sent, 1, "GET /v1/annealing", "GET /v1/annealing/step")
    enough(sent, 1, "GET /health/live", "GET /health/ready")


@pytest.mark.parametrize(
    ("paths", "posted"),
    [
        ("^/generate$", ["/generate"]),
        ("^/v1/completions$", ["/v1/completions"]),
        ("^/v1/chat/completions$", ["/v1/chat/completions"]),
        ("^/invocations$", ["/invocations"]),
        ("^/v1/(responses|models|tokenize)", ["/v1/responses", "/v1/tokenize"]),
    ],
)
def test_generating_routes_survive(
    described: Any, server: ServerProcess, sent: Counter[str], paths: str, posted: list[str]
) -> None:
    """SGLang's own description is not quite true: an honest answer is enough."""
    theirs = described.include(path_regex=paths).exclude(method="PUT")
    wrong = mistakes(theirs, server, sent, lambda case, answer: None)
    assert not wrong, "\n\n".join(wrong)
    enough(sent, 10 * SCALE, *(f"POST {path}" for path in posted))


def test_what_changes_the_server_is_closed_whatever_is_sent(
    described: Any, server: ServerProcess, sent: Counter[str]
) -> None:
    """To those without the admin key."""
    opened = []
    closed: Counter[str] = Counter()
    for case in cases(described.include(lambda context: "403" in responses_of(context))):
        answer = send(case, server, admin=False)
        sent["closed"] += 1
        closed[case.path] += 1
        if answer is not None and answer.status_code not in (401, 405) and case.method != "OPTIONS":
            opened.append(f"{answer.status_code} {case.as_curl_command()}")
    assert not opened, "\n".join(opened[:10])
    enough(closed, 1, *(path for _, path in ADMIN_ROUTES))


def responses_of(context: Any) -> dict[str, Any]:
    found: dict[str, Any] = context.operation.definition.raw["responses"]
    return found


# --- valid bodies, changed at random -----------------------------------------------------------


def test_no_body_gets_a_5xx(server: ServerProcess, sent: Counter[str]) -> None:
    draw = random.Random(SEED)
    headers = {"content-type": "application/json", **server.admin_headers}
    wrong: list[str] = []
    told_by: defaultdict[str, set[str]] = defaultdict(set)

    async def everything() -> None:
        gate = asyncio.Semaphore(16)
        # a connection each: one that was kept may be closed just when it is used again
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(
            base_url=server.url, headers=headers, limits=limits, timeout=600
        ) as http:

            async def one(method: str, path: str, body: bytes) -> None:
                async with gate:
                    try:
                        answer = await http.request(method, path, content=body)
                        told = f"{answer.status_code} {answer.text[:300]}"
                        bad = told_wrong(answer.status_code, answer.text)
                    except httpx.TransportError as error:
                        told, bad = repr(error), True
                sent["changed"] += 1
                told_by[path].add(told[:1])
                if bad:
                    wrong.append(f"{method} {path} {body[:300]!r} -> {told}")

            await asyncio.gather(*(one(*case(draw)) for _ in range(600 * SCALE)))

    asyncio.run(everything())
    assert not wrong, "\n\n".join(wrong[:10])
    assert sent["changed"] == 600 * SCALE
    # of every route some are whole enough to be done, and some are not
    assert told_by == {path: {"2", "4"} for _, path, _ in ROUTES}
