"""SGLang's checks of a request, and its way through the tokenizer manager."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from ead_sampler.defaults import shared_defaults, with_step
from ead_sampler.in_tokenizer.answer_seeds import SEED, seed_each_answer
from ead_sampler.in_tokenizer.answers import answers_of, markers_of
from ead_sampler.in_tokenizer.cost import check_cost
from ead_sampler.in_tokenizer.fields import (
    check_rollout,
    into_custom_params,
    is_requested,
    observe_items,
    sent_schedule,
    wants_arrays,
    with_default,
)
from ead_sampler.in_tokenizer.server_mode import check_generates, check_server_mode
from ead_sampler.names import ANNEALING, COLUMNS, ROLLOUT
from ead_sampler.schedules import (
    FieldError,
    check_beam_width,
    check_sampling,
    parse_annealing,
)


def verify_sampling_params(result: None, params: Any, vocab_size: int) -> None:
    """AFTER SamplingParams.verify: SGLang's own check of every request, on every route.

    Also reached by requests that put the schedule into `custom_params` themselves. A ValueError
    here is a clean 400; the same mistake in the scheduler would kill the server. From here the
    schedule travels as one string: SGLang's messages have no place for lists in lists.
    """
    custom = params.custom_params
    if is_requested(custom):
        check_rollout(custom.get(ROLLOUT))
        if custom.get(ANNEALING) is not None:
            schedule = parse_annealing(sent_schedule(custom))
            check_sampling({"temperature": params.temperature, "top_k": params.top_k})
            custom = {**custom, ANNEALING: schedule.model_dump_json()}
            params.custom_params = custom
        check_beam_width(params.beam_width)
        check_server_mode(custom)
    check_travels(custom)


def check_travels(custom_params: Any) -> None:
    """With SGLANG_USE_PICKLE_IPC=0 the scheduler dies of custom_params that are no flat JSON.

    Raises FieldError.
    """
    if custom_params is None or os.environ.get(_PICKLE, "1").lower() in ("1", "true", "yes", "y"):
        return
    import msgspec
    from sglang.srt.sampling.sampling_params import CustomParamValue

    try:
        data = msgspec.msgpack.encode(custom_params)
        msgspec.msgpack.decode(data, type=dict[str, CustomParamValue])
    except (msgspec.ValidationError, OverflowError, TypeError, RecursionError) as error:
        message = f"must be numbers, strings, and lists or objects of such ({error})"
        raise FieldError("custom_params", message) from None


_PICKLE = "SGLANG_USE_PICKLE_IPC"  # environment, of SGLang


def generate_request(
    original: Callable[..., AsyncIterator[Any]], manager: Any, obj: Any, request: Any = None
) -> AsyncIterator[Any]:
    """AROUND TokenizerManager.generate_request, which every route and Engine.generate go through.

    Requests that ask for nothing get the original iterator. `obj` is a GenerateReqInput (or an
    EmbeddingReqInput, which is left alone) whose sampling_params is a dict, or one per prompt.
    """
    params = getattr(obj, "sampling_params", None)
    each = params if isinstance(params, list) else [params or {}]
    if not hasattr(obj, "return_logprob"):
        return original(manager, obj, request)
    check_generates(manager)
    if not all(isinstance(p, dict) for p in each):
        return original(manager, obj, request)
    check_cost(each)
    each = [_completed(into_custom_params(with_default(p)), manager) for p in each]
    if params or any(each):
        obj.sampling_params = each if isinstance(params, list) else each[0]
    seed = SEED if manager.server_args.enable_deterministic_inference else None
    each = seed_each_answer(obj, seed) or each
    if not any(is_requested(p.get("custom_params")) for p in each):
        return original(manager, obj, request)
    if observe_items.get() is not None:
        obj.return_prompt_token_ids = True
    return _marked(original(manager, obj, request), manager, obj, each)


async def _marked(
    items: Any, manager: Any, obj: Any, each: list[dict[str, Any]]
) -> AsyncIterator[Any]:
    """The same items, their meta_info saying which schedule and which cuts were applied."""
    markers = [
        (markers_of(p, manager) if is_requested(custom) else {}, wants_arrays(custom))
        for p in each
        for custom in [p.get("custom_params")]
    ]
    observe = observe_items.get()
    async with aclosing(items):
        async for item in items:
            for index, answer in answers_of(item):
                prompt = index // (getattr(obj, "parallel_sample_num", 1) or 1)
                marker, arrays = markers[prompt if len(markers) > 1 else 0]
                meta = answer["meta_info"]
                # no arrays though asked for: the scheduler did not comply
                if not arrays or COLUMNS[0] in meta or not meta["completion_tokens"]:
                    meta.update(marker)
                if observe is not None:
                    observe(index, answer)
            yield item


def _completed(params: dict[str, Any], manager: Any) -> dict[str, Any]:
    """A schedule with the server's training step, if it has none, and its strings as tokens."""
    custom = params.get("custom_params")
    if not isinstance(custom, dict) or not isinstance(custom.get(ANNEALING), dict):
        return params
    schedule = parse_annealing(with_step(custom[ANNEALING])).resolved(
        getattr(manager, "tokenizer", None)
    )
    return {**params, "custom_params": {**custom, ANNEALING: schedule.model_dump()}}


# --- the server's own training step ------------------------------------------------------------


async def count_weight_update(
    original: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any
) -> Any:
    """AROUND the TokenizerManager calls that complete one update of the weights.

    Their results are (success, message, ...). The count is the training step of schedules whose
    request names none.
    """
    result = await original(manager, *args, **kwargs)
    if result[0]:
        shared_defaults().count_weight_update()
    return result
