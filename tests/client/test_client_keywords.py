"""What a call takes: a schedule by its name, and no keyword that is mistyped."""

from __future__ import annotations

import asyncio
import inspect
import json
from typing import Any, get_args

import httpx
import pytest
from openai.types import completion_create_params as of_completions
from openai.types.chat import completion_create_params as of_chats
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
from sglang.srt.sampling.sampling_params import SamplingParams

from ead_cli.schedule import parsed
from ead_client import AsyncClient, Client, EadError, NotSendable, RequestRefused
from ead_client._fields import PRESETS as OF_CLIENT
from ead_client._fields import check_keywords
from ead_client._types import Preset
from ead_sampler import PRESETS, REGISTRY

MESSAGES = [{"role": "user", "content": "2+3?"}]
CALLS = {"chat": MESSAGES, "complete": "a", "rollouts": ["a"]}
CALLS |= {"stream_chat": MESSAGES, "stream_rollouts": ["a"]}


def sent(call: str, kind: str = "sync", **keywords: Any) -> dict[str, Any]:
    """The body of a call, which the server then refuses."""
    bodies: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return httpx.Response(400, json={"error": {"message": "no"}})

    async def ask() -> None:
        async with AsyncClient("http://x", transport=httpx.MockTransport(answer)) as client:
            result = getattr(client, call)(CALLS[call], **keywords)
            if hasattr(result, "__anext__"):
                await anext(result)
            else:
                await result

    def ask_at_once() -> None:
        with Client("http://x", transport=httpx.MockTransport(answer)) as client:
            result = getattr(client, call)(CALLS[call], **keywords)
            next(result)  # of a stream; the others have raised

    try:
        asyncio.run(ask()) if kind == "async" else ask_at_once()
    except RequestRefused:
        pass
    except NotSendable:
        assert not bodies
        raise
    (body,) = bodies
    return body


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("call", CALLS)
def test_a_schedule_is_asked_for_by_name(call: str, kind: str) -> None:
    for given, want in (
        ("paper", {"preset": "paper"}),
        ("recipe", {"preset": "recipe"}),
        ("cosine", {"schedule": "cosine"}),
        ("of a newer server", {"schedule": "of a newer server"}),
        ('{"tau_max": 1.2}', {"tau_max": 1.2}),
        ({"preset": "paper"}, {"preset": "paper"}),
    ):
        body = sent(call, kind, annealing=given)
        assert {**body, **body.get("chat_template_kwargs", {})}["annealing"] == want


def test_the_client_and_the_command_line_read_a_name_alike() -> None:
    for name in (*PRESETS, *REGISTRY):
        try:
            found = parsed(name)
        except EadError:  # a kind that needs more than its name
            continue
        assert sent("rollouts", annealing=name)["annealing"] == found
    assert OF_CLIENT == get_args(Preset) == tuple(PRESETS)


@pytest.mark.parametrize(
    ("call", "keywords", "says"),
    [
        ("chat", {"anealing": "paper"}, "anealing: is not a known field; did you mean annealing?"),
        ("chat", {"max_tokns": 9}, "max_tokns: is not a known field; did you mean max_tokens?"),
        ("complete", {"temprature": 1}, "did you mean temperature?"),
        ("rollouts", {"max_new_token": 9}, "did you mean max_new_tokens?"),
        ("rollouts", {"Annealing": {}}, "did you mean annealing?"),
        ("stream_chat", {"rollouts": True}, "did you mean rollout?"),
        ("stream_rollouts", {"entropie": True}, "did you mean entropies?"),
        ("chat", {"annealing": 1.2}, "annealing: must be an object such as {'preset': 'paper'}"),
        ("chat", {"annealing": ["paper"]}, "annealing: must be an object"),
        ("chat", {"annealing": "{'preset': 1}"}, "annealing: is not valid JSON"),
        ("chat", {"rollout": "entropies"}, "rollout: must be true, false or {'entropies': true}"),
    ],
)
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_mistyped_keyword_is_refused_before_anything_is_sent(
    call: str, kind: str, keywords: dict[str, Any], says: str
) -> None:
    with pytest.raises(NotSendable) as caught:
        sent(call, kind, **keywords)
    assert isinstance(caught.value, ValueError)
    assert caught.value.param == next(iter(keywords))
    assert says in str(caught.value)


def test_other_keywords_are_the_servers() -> None:
    assert sent("chat", of_a_newer_server=1)["of_a_newer_server"] == 1
    assert sent("rollouts", top_k=5)["sampling_params"] == {"top_k": 5}
    check_keywords(of_chats.CompletionCreateParamsBase.__annotations__)
    check_keywords(of_completions.CompletionCreateParamsBase.__annotations__)
    check_keywords(ChatCompletionRequest.model_fields)
    check_keywords(CompletionRequest.model_fields)
    check_keywords(inspect.signature(SamplingParams.__init__).parameters)
