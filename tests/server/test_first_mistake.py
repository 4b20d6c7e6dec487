"""What megabytes of mistakes cost: no more than one."""

from __future__ import annotations

import copy
from typing import Any

import orjson
import pytest
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import ValidationError

from ead_sampler import AnnealingError, device, parse_annealing
from ead_server.edge.fail_fast import MAX_ENTRIES, stop_at_first_mistake
from ead_server.rollouts.job import RolloutRequest

MANY = 20_000
ODD = ["x"] * MANY
KEYS = {f"k{i}": "x" for i in range(MANY)}
MESSAGE = {"role": "user", "content": "x"}


@pytest.fixture(scope="module")
def bodies() -> dict[str, Any]:
    """What reads the body of each of SGLang's routes, by path."""
    device.choose()
    from sglang.srt.entrypoints.http_server import app

    stop_at_first_mistake(app.routes)
    routes = [r for r in app.routes if isinstance(r, APIRoute) and r.dependant.body_params]
    return {route.path: route.dependant.body_params[0] for route in routes}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": ODD}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": ODD}]}),
        ("/v1/chat/completions", {"messages": [{**MESSAGE, "content": [{"type": 1}] * MANY}]}),
        ("/v1/chat/completions", {"messages": [MESSAGE], "tools": ODD}),
        ("/v1/chat/completions", {"messages": [MESSAGE], "stop": [1] * MANY}),
        ("/v1/chat/completions", {"messages": [MESSAGE], "logit_bias": KEYS}),
        ("/v1/completions", {"model": "m", "prompt": [*ODD, 1]}),
        ("/v1/completions", {"model": "m", "prompt": [[1], *ODD]}),
        ("/v1/embeddings", {"model": "m", "input": [None] * MANY}),
        ("/generate", {"text": "x", "sampling_params": ODD}),
        ("/generate", {"text": [1] * MANY}),
        ("/generate", {"text": "x", "token_ids_logprob": [["x"]] * MANY}),
        ("/v1/score", {"model": "m", "query": "a", "items": [{}] * MANY}),
    ],
)
def test_sglang_s_routes_tell_a_few_mistakes_of_many(
    bodies: dict[str, Any], path: str, body: dict[str, Any]
) -> None:
    """Without it, 20,000 to 300,000 of them."""
    _, errors = bodies[path].validate(body, loc=("body",))
    assert 1 <= len(errors) <= 40


PROMPTS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}


@pytest.mark.parametrize("path", [*PROMPTS, "/generate"])
@pytest.mark.parametrize("body", [None, [], "x", 5, {"response_format": []}, {"messages": 5}])
def test_what_sglang_s_own_checks_do_not_expect_is_a_mistake(
    bodies: dict[str, Any], path: str, body: Any
) -> None:
    """Of the whole body, or of the prompt. Where /generate ignores fields that it does not know,
    SGLang's own next step finds that there is no prompt."""
    try:
        read, errors = bodies[path].validate(copy.copy(body), loc=("body",))
    except RequestValidationError as error:
        read, errors = None, list(error.errors())
    if path == "/generate" and isinstance(body, dict):
        assert errors == []
        with pytest.raises(ValueError, match="input_ids"):
            read.normalize_batch_and_arguments()
        return
    assert read is None
    where = ("body", PROMPTS[path]) if isinstance(body, dict) else ("body",)
    assert where in [tuple(error["loc"]) for error in errors]


def test_what_was_right_is_read_as_before(bodies: dict[str, Any]) -> None:
    part = {"type": "text", "text": "x"}
    body = {
        "messages": [MESSAGE, {"role": "user", "content": [part, part]}],
        "stop": ["a", "b"],
        "logit_bias": {str(i): 1.0 for i in range(MAX_ENTRIES)},
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": [1, {}]}}}],
    }
    read, errors = bodies["/v1/chat/completions"].validate(body, loc=("body",))
    assert errors == []
    assert read == type(read).model_validate(body)
    many = [f"s{i}" for i in range(MANY)]
    read, errors = bodies["/v1/completions"].validate({"model": "m", "prompt": many}, loc=())
    assert (errors, read.prompt) == ([], many)


@pytest.mark.parametrize(
    "body",
    [
        {"prompts": [1] * MANY},
        {"prompts": [ODD]},
        {"prompts": [{"messages": ODD}]},
        {"prompts": [{"token_ids": ["5"] * MANY}]},
        {"prompts": [{"token_ids": [1], "prefix_token_ids": ODD}]},
        {"prompts": [KEYS]},
        KEYS,
    ],
)
def test_rollouts_tell_one(body: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        RolloutRequest.model_validate(orjson.loads(orjson.dumps(body)))
    assert caught.value.error_count() <= 2


@pytest.mark.parametrize(
    "raw",
    [
        KEYS,
        {"mean_matched": KEYS},
        {"schedule": "piecewise", "knots": ODD},
        {"schedule": "piecewise", "knots": [ODD]},
        {"schedule": "piecewise", "knots": [[1.0] * MANY]},
        {"schedule": "segment", "thinking": {}, "restart_token_ids": ODD},
        {"schedule": "segment", "thinking": {}, "restart_strings": ["x" * MANY]},
        {"schedule": "segment", "thinking": KEYS},
        {"schedule": "x" * MANY},
        {"tau_max": ODD},
    ],
)
def test_a_schedule_s_mistake_is_told_in_a_line(raw: Any) -> None:
    with pytest.raises(AnnealingError) as caught:
        parse_annealing(raw)
    assert len(str(caught.value)) < 500
