"""What a client may ask of `POST /v1/rollouts`, and reading it."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

import orjson
from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from ead_server import settings
from ead_server.edge.fail_fast import FewKeys
from ead_server.edge.limits import check_range
from ead_server.errors import LimitExceeded
from ead_server.json_types import Json

MAX_PROMPTS = 65_536  # of one request, whatever --max-answers is


def _as_prompt(raw: Any) -> Any:
    """A text, token ids or messages, alone, as the object that says which it is."""
    if isinstance(raw, str):
        return {"text": raw}
    if isinstance(raw, list):
        whole = bool(raw) and all(type(item) is int for item in raw)
        return {"token_ids": raw} if whole else {"messages": raw}
    return raw


# fail_fast: pydantic would collect the mistakes of millions of items
TokenIds = Annotated[list[int], Field(fail_fast=True)]
Messages = Annotated[list[Json], Field(fail_fast=True)]
_FORMS = {"text": "string", "messages": "array", "token_ids": "array"}  # and their JSON types


class Prompt(FewKeys):
    """One prompt: exactly one of text, messages and token_ids."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {
                    "required": [form],
                    "properties": {
                        other: {"type": kind if other == form else "null"}
                        for other, kind in _FORMS.items()
                    },
                }
                for form in _FORMS
            ]
        },
    )

    text: str | None = None
    messages: Messages | None = Field(None, description="chat messages; the template is applied")
    token_ids: TokenIds | None = None
    prefix_token_ids: TokenIds = Field(
        [],
        description="tokens of an answer to continue; the schedule goes on after them, unless "
        "`annealing.position_offset` says otherwise",
    )
    n: int | None = Field(None, ge=1, description="answers to this prompt, if not the request's n")
    metadata: Any = Field(None, description="comes back with the group, as it is")

    @model_validator(mode="after")
    def _one_form(self) -> Prompt:
        if sum(getattr(self, form) is not None for form in _FORMS) != 1:
            raise ValueError("must have exactly one of text, messages and token_ids")
        return self


_PromptForms = str | Annotated[TokenIds, Field(min_length=1)] | list[Json] | Prompt


def _few_prompts(raw: Any) -> Any:
    if isinstance(raw, list) and len(raw) > MAX_PROMPTS:  # counted before anything is made of them
        raise ValueError(f"must be at most {MAX_PROMPTS:,}, got {len(raw):,}")
    return raw


class RolloutRequest(FewKeys):
    """Many prompts, n answers to each, one schedule."""

    prompts: Annotated[
        list[Annotated[Prompt, BeforeValidator(_as_prompt, json_schema_input_type=_PromptForms)]],
        BeforeValidator(_few_prompts),
    ] = Field(
        min_length=1,
        fail_fast=True,
        description="each a text, token ids, chat messages, or a Prompt object",
    )
    n: int = Field(1, ge=1, description="answers to each prompt")
    model: str | None = Field(None, description="not needed; as in OpenAI's requests")
    annealing: Json | None = Field(
        None, description="the schedule; absent: the server's default; null: none"
    )
    sampling_params: Json = Field(
        {},
        description="SGLang's sampling parameters (max_new_tokens, stop, top_p, ...). Nothing is "
        "truncated unless told here, whatever the model's own defaults are: without "
        "max_new_tokens, an answer may go on to the end of the context. sampling_seed: of the "
        "request's first answer; the others count up from it, group by group",
    )
    entropies: bool = Field(False, description="also the next-token entropies, in nats")
    texts: bool = Field(
        True, description="false: no text, a third of the bytes, for who decodes token_ids"
    )


def parse(body: bytes) -> RolloutRequest:
    """The request in a body. Raises BadField, and pydantic's and orjson's errors."""
    parsed = orjson.loads(body)
    if _MANY_DIGITS.search(body):  # orjson makes a float of an integer beyond 64 bits
        json.loads(body, parse_int=_check_integer)
    request = RolloutRequest.model_validate(parsed)
    _check_size(request)
    return request


_MANY_DIGITS = re.compile(rb"[0-9]{19}")


def _check_integer(digits: str) -> None:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**64:
        raise LimitExceeded("body", f"integers must fit 64 bits, got {digits:.40}")


def _check_size(request: RolloutRequest) -> None:
    limits = settings.current() or settings.Settings.model_validate({})
    check_range("n", request.n, 1, limits.max_n)
    for index, prompt in enumerate(request.prompts):
        check_range(f"prompts.{index}.n", prompt.n, 1, limits.max_n)
    answers = sum(prompt.n or request.n for prompt in request.prompts)
    if answers > limits.max_answers:
        raise LimitExceeded(
            "prompts", f"must ask for at most {limits.max_answers} answers in all, got {answers}"
        )
