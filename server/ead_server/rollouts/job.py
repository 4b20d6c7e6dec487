"""`POST /v1/rollouts`: many prompts times n under one schedule, group by group.

Each prompt of a request becomes a Group of n engine requests, and a Job runs all groups at once.
How an answer is written (JSON, safetensors, streams of either) is `packing`'s.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable

import numpy as np
from fastapi import HTTPException

from ead_sampler.defaults import with_step
from ead_sampler.in_tokenizer.answer_seeds import SEED
from ead_sampler.in_tokenizer.fields import with_default
from ead_sampler.in_tokenizer.server_mode import check_server_mode
from ead_sampler.names import ANNEALING, COLUMNS, CONTINUED, ENTROPIES, ROLLOUT
from ead_sampler.schedules import check_sampling, parse_annealing
from ead_server.annealing.recorder import answer_facts
from ead_server.edge.limits import check_range, check_token_ids, check_types
from ead_server.errors import BadField, openai_error
from ead_server.json_types import Json
from ead_server.rollouts.engine import Engine
from ead_server.rollouts.request import Prompt, RolloutRequest

# SGLang's own defaults, which a model's generation_config would otherwise change silently
# (and of 128 tokens; null: as many as fit the context)
UNTRUNCATED = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "max_new_tokens": None}
MAX_MESSAGE = 2_000  # characters of an error
# Seconds without a byte after which a stream shows that it goes on: clients and proxies take longer
# silence for a lost connection.
QUIET_S = 30.0
MAX_SEED = 1 << 62  # either sign; the seeds that count up from it fit 64 bits


def plan(request: RolloutRequest) -> list[Group]:
    """The groups to run, with their checked parameters. Raises AnnealingError, BadField."""
    from sglang.srt.runtime_context import get_server_args

    params = dict(request.sampling_params)
    if "n" in params:
        raise BadField("sampling_params.n", "is the request's own field `n`")
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
    return {**answer, **answer_facts(meta), "cached_tokens": meta.get("cached_tokens") or 0}


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
