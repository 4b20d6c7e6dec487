"""`POST /v1/rollouts`: many prompts times n under one schedule, group by group.

The request is checked here, each prompt becomes a Group of n engine requests, and a Job runs all
groups at once. How an answer is written (JSON, safetensors, streams of either) is `packing`'s.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import AsyncIterator, Callable
from functools import cache
from typing import Annotated, Any

import numpy as np
from fastapi import HTTPException, Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import SchemaValidator, ValidationError

from ead_sampler.defaults import with_step
from ead_sampler.requests import (
    ANNEALING,
    COLUMNS,
    CONTINUED,
    ENTROPIES,
    ROLLOUT,
    SEED,
    check_generates,
    check_sampling,
    check_server_mode,
    with_default,
)
from ead_sampler.schedule import AnnealingError, parse_annealing, with_integers
from ead_server.admission import check_range, check_token_ids, check_types
from ead_server.bodies import check_text, max_text
from ead_server.errors import LimitExceeded, as_openai_error, openai_error, place_of
from ead_server.first_mistake import validator_of
from ead_server.recorder import said_of

Json = dict[str, Any]

# SGLang's own defaults, which a model's generation_config would otherwise change silently
# (and of 128 tokens; null: as many as fit the context)
UNTRUNCATED = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "max_new_tokens": None}
MAX_MESSAGE = 2_000  # characters of an error
# Seconds without a byte after which a stream shows that it goes on: clients and proxies take longer
# silence for a lost connection.
QUIET_S = 30.0
STILL_S = 300.0  # without a sign of the engine, after which it may have died
MAX_PROMPTS = 65_536  # of one request, whatever --max-answers is
MAX_SEED = 1 << 62  # either sign; the seeds that count up from it fit 64 bits


# --- the request -----------------------------------------------------------------------------


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


class FewKeys(BaseModel):
    """Unknown keys are refused, and not each by itself where there are millions."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _count(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and len(raw) > 100:
            raise ValueError("has too many keys")
        return with_integers(cls, raw)


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


def plan(request: RolloutRequest) -> list[Group]:
    """The groups to run, with their checked sampling parameters. Raises AnnealingError."""
    from sglang.srt.runtime_context import get_server_args

    params = dict(request.sampling_params)
    if "n" in params:
        raise AnnealingError("sampling_params.n", "is the request's own field `n`")
    seed = params.get("sampling_seed")
    check_range("sampling_params.sampling_seed", seed, -MAX_SEED, MAX_SEED)
    check_types(params)  # here too: a mistake that all answers share is the whole request's
    said = {ANNEALING: request.annealing} if ANNEALING in request.model_fields_set else {}
    raw = with_default({**params, **said}).get(ANNEALING)
    check_server_mode({ANNEALING: raw})
    if raw is not None:
        check_sampling(params)
        raw = with_step(raw)  # one step for all answers, also if another is set meanwhile
        parse_annealing(raw)
    rollout = {ENTROPIES: True} if request.entropies else True
    params = {**UNTRUNCATED, **params}
    groups: list[Group] = []
    if seed is None and get_server_args().enable_deterministic_inference:
        seed = SEED
    for index, prompt in enumerate(request.prompts):
        fields = {**params, ANNEALING: raw, ROLLOUT: rollout}
        offset = len(prompt.prefix_token_ids)
        if raw is not None and offset and "position_offset" not in (request.annealing or {}):
            fields[ANNEALING] = {**raw, "position_offset": offset}
            parse_annealing(fields[ANNEALING])
        if offset:
            fields["custom_params"] = {**(params.get("custom_params") or {}), CONTINUED: offset}
        if seed is not None:
            fields["sampling_seed"] = seed + sum(group.n for group in groups)
        groups.append(Group(index, prompt, prompt.n or request.n, fields, texts=request.texts))
    return groups


# --- running it --------------------------------------------------------------------------------


class Group:
    """One prompt and its answers, as they are generated and as they are kept."""

    def __init__(
        self, index: int, prompt: Prompt, n: int, params: Json, *, texts: bool = True
    ) -> None:
        self.index = index
        self.prompt = prompt
        self.n = n
        self.params = params
        self.texts = texts
        self.prompt_token_ids = np.empty(0, np.int32)  # prefix included
        self.answers: list[Json] = []  # "error", or the columns as arrays and what is said of them
        self.error: Json | None = None  # of the whole group

    async def run(self, engine: Engine) -> Group:
        """Generate all answers. What goes wrong is told in `error` here or in an answer."""
        try:
            token_ids = await engine.token_ids(self.prompt) + self.prompt.prefix_token_ids
            engine.check_fits(token_ids)
            check_token_ids(token_ids, engine.manager.model_config.vocab_size)
            self.prompt_token_ids = np.asarray(token_ids, np.int32)
            if self.n > 1:  # as SGLang does: the prompt is computed once, then found in the cache
                await engine.generate(token_ids, {"max_new_tokens": 0})
        except Exception as error:
            self.error = _typed(error)
            return self
        # all are waited for, also when one fails; a cancelled job cancels them
        self.answers = await asyncio.gather(
            *(self._answer(engine, token_ids, index) for index in range(self.n))
        )
        return self

    async def _answer(self, engine: Engine, token_ids: list[int], index: int) -> Json:
        params = self.params
        if params.get("sampling_seed") is not None:
            params = {**params, "sampling_seed": params["sampling_seed"] + index}
        try:
            item = await engine.generate(token_ids, params)
            if not self.texts:
                item.pop("text", None)
            return _columnar(item, params)
        except Exception as error:
            return {"error": _typed(error)}


def _columnar(item: Json, params: Json) -> Json:
    """An engine's answer as arrays of the same length and what is said of them."""
    meta = item["meta_info"]
    count = meta["completion_tokens"]
    answer: Json = {"text": item.get("text"), "error": None}
    answer["token_ids"] = np.asarray(item["output_ids"], np.int32)
    names = (*COLUMNS, ENTROPIES) if isinstance(params[ROLLOUT], dict) else COLUMNS
    for name in names:
        answer[name] = np.asarray(meta.get(name) or (), np.float32)
    if any(len(answer[name]) != count for name in ("token_ids", *names)):
        raise RuntimeError("the sampler did not record this answer")
    return {**answer, **said_of(meta), "cached_tokens": meta.get("cached_tokens") or 0}


def _typed(error: Exception) -> Json:
    """An exception as OpenAI's error object, never with a stack trace."""
    if isinstance(error, ValueError):
        field = getattr(error, "field", None)
        return dict(openai_error(str(error)[:MAX_MESSAGE], field, code=400)["error"])
    if isinstance(error, HTTPException):
        message = str(error.detail)
        return dict(openai_error(message, None, "server_error", error.status_code)["error"])
    message = f"{type(error).__name__} in the server"
    return dict(openai_error(message, None, "server_error", 500)["error"])


@cache
def _tokenize_request() -> SchemaValidator:
    """Reads what SGLang's route for tokenising takes; its own finds every mistake of a message."""
    from sglang.srt.entrypoints.openai.protocol import TokenizeRequest

    return validator_of(TokenizeRequest)


class Engine:
    """SGLang in this process, as `/v1/rollouts` uses it. Raises AnnealingError if it embeds."""

    def __init__(self, app: Any) -> None:
        from sglang.srt.entrypoints.http_server import get_global_state

        self.app = app
        self.manager = get_global_state().tokenizer_manager
        check_generates(self.manager)

    def check_fits(self, token_ids: list[int]) -> None:
        """Raises LimitExceeded, before anything else looks at each token."""
        limit = self.manager.model_config.context_len
        if len(token_ids) >= limit:
            length = f"{len(token_ids):,} tokens are longer"
            message = f"{length} than the model's context length of {limit:,}, less one to answer"
            raise LimitExceeded("prompts", message)

    async def token_ids(self, prompt: Prompt) -> list[int]:
        """The prompt's tokens, as SGLang's own routes would make them. Raises ValueError."""
        if prompt.token_ids is not None:
            return prompt.token_ids
        from sglang.srt.entrypoints.openai.protocol import TokenizeResponse

        if self.manager.tokenizer is None:
            raise AnnealingError("prompts", "needs a tokenizer, which this server has not")
        raw = {"prompt": prompt.text, "messages": prompt.messages}
        check_text([prompt.text, prompt.messages], max_text(self.manager), "prompts")
        try:
            request = _tokenize_request().validate_python(raw)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise AnnealingError("prompts", f"{place_of(first['loc'])}: {first['msg']}") from None
        serving = self.app.state.openai_serving_tokenize
        answer = await serving.handle_request(request, None)
        if not isinstance(answer, TokenizeResponse):
            message = as_openai_error(getattr(answer, "body", b""))["error"]["message"]
            raise AnnealingError("prompts", f"cannot be tokenised: {message[:500]}")
        return list(answer.tokens)

    def at_work(self) -> bool:
        """Whether answers may still come: generation is not paused, and the engine has been heard
        of lately (it sends what it has generated every 50 tokens)."""
        silent_s = time.time() - self.manager.last_receive_tstamp
        return not self.manager.is_pause and silent_s < STILL_S

    async def generate(self, token_ids: list[int], params: Json) -> Json:
        """One answer; cancelling this ends the generation in the engine."""
        from sglang.srt.managers.io_struct import GenerateReqInput

        item = GenerateReqInput(input_ids=list(token_ids), sampling_params=dict(params))
        items = self.manager.generate_request(item)
        try:
            answer: Json = await anext(items)
        finally:
            await items.aclose()
        return answer


class Job:
    """All groups of one request, running from the moment that it is made."""

    def __init__(self, groups: list[Group], engine: Engine, model: str) -> None:
        self.id = f"rollouts-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model = model
        self.groups = groups
        self._engine = engine
        self.tasks = [asyncio.create_task(group.run(engine)) for group in groups]

    async def as_completed(self) -> AsyncIterator[Group | None]:
        """Groups in the order in which they complete, any number of times. None whenever none has
        for QUIET_S of an engine at work: of one that stands still, clients may give up."""
        finished: asyncio.Queue[asyncio.Task[Group]] = asyncio.Queue()
        for task in self.tasks:
            task.add_done_callback(finished.put_nowait)
        came = 0
        while came < len(self.tasks):
            try:
                async with asyncio.timeout(QUIET_S):
                    task = await finished.get()
            except TimeoutError:
                if self._engine.at_work():
                    yield None
                continue
            came += 1
            yield task.result()

    async def wait(self) -> None:
        await asyncio.gather(*self.tasks)

    @property
    def done(self) -> bool:
        return all(task.done() for task in self.tasks)

    def when_done(self, then: Callable[[], None]) -> None:
        """Call this when all groups are."""
        left = len(self.tasks)

        def count(_: object) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                then()

        for task in self.tasks:
            task.add_done_callback(count)

    def cancel(self) -> None:
        """Stop what is still running; the engine is free at once."""
        for task in self.tasks:
            task.cancel()

    @property
    def num_bytes(self) -> int:
        """What its answers take in memory now, about."""
        answers = (answer for group in self.groups for answer in group.answers)
        return sum(
            len(value) if isinstance(value, str) else getattr(value, "nbytes", 0)
            for answer in answers
            for value in answer.values()
        )

    def about(self) -> Json:
        """Which job this is, and as what."""
        return {"id": self.id, "created": self.created, "model": self.model}

    def usage(self) -> Json:
        answers = [a for group in self.groups for a in group.answers if a["error"] is None]
        prompt = sum(len(group.prompt_token_ids) for group in self.groups)
        completion = sum(len(answer["token_ids"]) for answer in answers)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }


# --- jobs that are asked for again -------------------------------------------------------------


class KeyReused(ValueError):
    """The idempotency key came with another request before."""


class TooManyJobs(RuntimeError):
    """As many jobs with a key as are kept are still running."""


class KeptJobs:
    """Jobs by idempotency key, so that a call that is made again finds the work of the first.

    A job with a key goes on when its client is gone, since it will be asked for again; its groups
    are kept for `keep_s` seconds after the last one asked. Of at most `max_jobs` in `max_bytes`,
    then: without clients, nothing else bounds them.
    """

    def __init__(self, keep_s: float = 600.0, max_jobs: int = 64, max_bytes: int = 1 << 30) -> None:
        self.keep_s = keep_s
        self.max_jobs = max_jobs
        self.max_bytes = max_bytes
        self._jobs: dict[str, tuple[bytes, Job, float]] = {}  # by key, oldest first

    def find(self, key: str, body: bytes) -> Job | None:
        """The job that this request began before. Raises KeyReused; TooManyJobs when there is none
        and no room for it."""
        self._forget()
        if key not in self._jobs:
            running = [job for _, job, _ in self._jobs.values() if not job.done]
            if len(running) >= self.max_jobs:
                raise TooManyJobs(f"{self.max_jobs} jobs with an Idempotency-Key are running")
            if (size := sum(job.num_bytes for job in running)) >= self.max_bytes:
                raise TooManyJobs(f"running jobs with an Idempotency-Key take {size:,} bytes")
            return None
        fingerprint, job, _ = self._jobs.pop(key)
        self._jobs[key] = (fingerprint, job, time.monotonic())
        if fingerprint != hashlib.sha256(body).digest():
            raise KeyReused("Idempotency-Key: was used before, with another request")
        return job

    def keep(self, key: str, body: bytes, job: Job) -> None:
        self._jobs[key] = (hashlib.sha256(body).digest(), job, time.monotonic())
        self._forget()
        job.when_done(self._forget)  # older jobs make room for its answers
        asyncio.get_running_loop().call_later(self.keep_s + 1, self._forget)

    def _forget(self) -> None:
        now = time.monotonic()
        size = sum(job.num_bytes for _, job, _ in self._jobs.values())
        for key, (_, job, asked_at) in list(self._jobs.items()):
            too_many = len(self._jobs) > self.max_jobs or size > self.max_bytes
            if (too_many and job.done) or now - asked_at > self.keep_s:
                size -= job.num_bytes
                job.cancel()
                del self._jobs[key]


async def until_gone(request: Request) -> None:
    """Return when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
