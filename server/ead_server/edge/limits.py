"""Every generation, whatever its route, on its way into the engine and out of it.

In: limits that SGLang does not have, each of which one request could otherwise kill the server with
(shared/RELIABILITY.md, B2), and request ids of our own. Out: what the log and the metrics say.
Only for requests that came through the guard of `ead serve`.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from typing import Any

import regex
from fastapi import HTTPException

from ead_sampler.in_tokenizer.answers import answers_of
from ead_sampler.names import ANNEALING, COLUMNS, ROLLOUT
from ead_sampler.schedules import FieldError, short_repr
from ead_server import metrics
from ead_server.calls import Call, current_call
from ead_server.edge import grammars, stop_regex
from ead_server.errors import LimitExceeded
from ead_server.settings import Settings

MAX_LOGIT_BIAS = 1024  # entries
MAX_STOP_LENGTH = 1024  # characters of a stop string or regex
MAX_STOP_TOKENS = 1024
MAX_TOKEN_IDS_LOGPROB = 1024
MAX_FLOAT = 1e9  # of any sampling parameter, either sign
MAX_INT = 2**31 - 1

# fields of a GenerateReqInput
_REFUSED = {
    "custom_logit_processor": "it is code that this server would have to run; use `annealing`",
    "positional_embed_overrides": "JSON cannot express it, and what it can kills the scheduler",
}


def generate_request(
    original: Callable[..., AsyncIterator[Any]], manager: Any, obj: Any, request: Any = None
) -> AsyncIterator[Any]:
    """AROUND TokenizerManager.generate_request, outside the sampler's own.

    Raises LimitExceeded, which every route answers as a 400.
    """
    call = current_call.get()
    if call is None:
        return original(manager, obj, request)
    # SGLang aborts by prefix: a client that chose "a" could end every request that begins with it
    obj.rid = None
    try:
        if hasattr(obj, "return_logprob"):  # else an embedding
            check_limits(obj, call.settings)
        for token_ids in _prompts_of_ids(obj.input_ids):
            check_token_ids(token_ids, manager.model_config.vocab_size)
        return _counted(original(manager, obj, request), call)
    except (LimitExceeded, FieldError) as error:
        call.refused = "limit" if isinstance(error, LimitExceeded) else "schedule"
        call.bad_value = str(error)
        raise


def check_limits(obj: Any, limits: Settings) -> None:
    """Raises LimitExceeded. obj: a GenerateReqInput as a route built it, not yet normalised."""
    for name, reason in _REFUSED.items():
        if getattr(obj, name):
            raise LimitExceeded(name, f"is refused: {reason}")
    params = {} if obj.sampling_params is None else obj.sampling_params
    each = params if isinstance(params, list) else [params]
    num_prompts = _num_prompts(obj)
    _check_lists(obj, num_prompts)
    num_answers = 0
    for param in each:
        if not isinstance(param, dict):
            raise LimitExceeded("sampling_params", f"must be an object, got {short_repr(param)}")
        check_types(param, besides=_NOT_IN_CONTRACT)
        n = param.get("n")
        n = 1 if n is None else n
        check_range("n", n, 1, limits.max_n)
        num_answers += n if len(each) > 1 else n * (num_prompts or 1)
        _check_stops(param, limits.max_stop)
        grammars.check(param)
        _check_numbers(param)
        _check_length("stop_token_ids", param.get("stop_token_ids"), MAX_STOP_TOKENS)
        _check_length("logit_bias", param.get("logit_bias"), MAX_LOGIT_BIAS)
    if num_answers > limits.max_answers:
        raise LimitExceeded(
            "n", f"prompts times n must be at most {limits.max_answers}, got {num_answers}"
        )
    for number in _flat(obj.top_logprobs_num):
        check_range("top_logprobs_num", number, 0, limits.max_top_logprobs)
    _check_session(obj.session_params)
    _check_labels(obj.custom_labels)
    for number in _flat(obj.logprob_start_len):
        check_range("logprob_start_len", number, -1, MAX_INT)
    _check_length("token_ids_logprob", obj.token_ids_logprob, MAX_TOKEN_IDS_LOGPROB)
    for token_ids in obj.token_ids_logprob or ():
        _check_length("token_ids_logprob", token_ids, MAX_TOKEN_IDS_LOGPROB)


def check_token_ids(token_ids: list[int], vocab_size: int, field: str = "input_ids") -> None:
    """Raises LimitExceeded for those that the model has not."""
    for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
        if not 0 <= token_id < vocab_size:
            raise LimitExceeded(
                field, f"must be token ids in [0, {vocab_size - 1}], got {token_id}"
            )


def _check_lists(obj: Any, num_prompts: int | None) -> None:
    """Lists with an entry for each prompt have as many; SGLang only finds out by an index error."""
    for name in _PER_PROMPT:
        value = getattr(obj, name)
        if name in _LISTS_OF_EACH and not (value and _is_list(value[0])):
            continue  # one list, for all prompts
        if _is_list(value) and len(value) != num_prompts:
            wanted = "no list, for one prompt" if num_prompts is None else f"{num_prompts} entries"
            raise LimitExceeded(name, f"must have {wanted}, got {len(value)}")


_LISTS_OF_EACH = ("token_ids_logprob", "multi_item_delimiter_indices", "token_indices_to_pool")
_PER_PROMPT = (
    *_LISTS_OF_EACH,
    "sampling_params",
    "return_logprob",
    "logprob_start_len",
    "top_logprobs_num",
    "return_sampling_mask",
    "sampling_logprobs_mode",
    "return_hidden_states",
    "lora_path",
)


def check_types(params: dict[str, Any], besides: Sequence[str] = ()) -> None:
    """SGLang's own check of names and types of sampling parameters, which only /generate makes; its
    scheduler makes none. Raises LimitExceeded, naming the parameter."""
    from sglang.srt.entrypoints.api_contract import generate_contract_error
    from sglang.srt.sampling.sampling_params import SamplingParams

    for name, value in params.items():
        if name in besides:
            continue
        error: str | None = f"unknown field `{name:.80}`"
        if name in SamplingParams.__struct_fields__:  # the check knows of one more, `choice`
            error = generate_contract_error({"sampling_params": {name: value}})
        if error is not None:
            raise LimitExceeded(f"sampling_params.{name}", error)


# ours, and what SGLang's chat route adds
_NOT_IN_CONTRACT = (ANNEALING, ROLLOUT, "ebnf_full_assistant")


def _check_session(params: Any) -> None:
    """Values of another type, and a replacement of everything, kill the scheduler."""
    if not isinstance(params, dict):
        return
    for name, value in params.items():
        if name not in _SESSION:
            raise LimitExceeded(f"session_params.{name}", "unknown key")
        if value is not None and type(value) is not _SESSION[name]:
            kind = _SESSION[name].__name__
            raise LimitExceeded(
                f"session_params.{name}", f"must be {kind}, got {short_repr(value)}"
            )
    if params.get("replace") and params.get("rid") is None:
        raise LimitExceeded("session_params.replace", "needs the rid of what is replaced")


_SESSION = {"id": str, "rid": str, "offset": int, "replace": bool, "drop_previous_output": bool}


def _check_labels(labels: Any) -> None:
    """SGLang's metrics fail on a label that they were not made with, and the server with them."""
    from sglang.srt.runtime_context import get_server_args

    known = get_server_args().tokenizer_metrics_allowed_custom_labels or ()
    for label in labels or ():
        if label not in known:
            message = f"unknown label; known are {list(known)}"
            raise LimitExceeded(f"custom_labels.{label:.80}", message)


def check_range(field: str, value: object, low: int, high: int) -> None:
    """Raises LimitExceeded; None is absent."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise LimitExceeded(
            field, f"must be an integer in [{low}, {high}], got {short_repr(value)}"
        )


def _check_stops(param: dict[str, Any], max_stop: int) -> None:
    """Of `stop` and `stop_regex`: how many, how long, and that each says something: an empty one
    would end every answer at its first token. Raises LimitExceeded."""
    strings, patterns = ([*_flat(_absent_as(param.get(n), ()))] for n in ("stop", "stop_regex"))
    for name, values in (("stop", strings), ("stop_regex", patterns)):
        _check_length(name, values, max_stop)
        for value in values:
            _check_length(name, value, MAX_STOP_LENGTH)
            if value == "":
                raise LimitExceeded(name, "must not be empty, got ''")
    for pattern in patterns:
        try:
            fast = stop_regex.matches_fast(pattern)
            empty = fast and stop_regex.is_empty_match(pattern)
        except (re.error, regex.error, RecursionError, OverflowError, TypeError) as error:
            raise LimitExceeded("stop_regex", f"is no regular expression ({error})") from None
        except TimeoutError:
            fast, empty = False, False
        if not fast:
            raise LimitExceeded(
                "stop_regex",
                "could take too long to match: at most one * or + (bound the others, as in "
                f"{{1,9}}), and no choices that repeat, got {short_repr(pattern)}",
            )
        if empty:
            message = f"must not match the empty text, got {short_repr(pattern)}"
            raise LimitExceeded("stop_regex", message)


def _absent_as(value: Any, default: Any) -> Any:
    return default if value is None else value


def _check_numbers(params: dict[str, Any]) -> None:
    """Every number of the sampling parameters fits a tensor: SGLang's scheduler makes them into
    tensors without looking, and dies of those that do not."""
    for name, value in params.items():
        values = value.values() if isinstance(value, dict) and name == "logit_bias" else [value]
        for number in _flat(value) if _is_list(value) else values:
            if isinstance(number, int):
                high = 1 << (63 if name == "sampling_seed" else 31)
                if not -high <= number < high:
                    bits = 64 if name == "sampling_seed" else 32
                    raise LimitExceeded(name, f"must fit {bits} bits, got {number!r:.80}")
            elif isinstance(number, float) and not abs(number) <= MAX_FLOAT:
                raise LimitExceeded(
                    name, f"must be a finite number of at most {MAX_FLOAT:g}, got {number!r}"
                )


def _check_length(field: str, value: object, high: int) -> None:
    if isinstance(value, (str, list, tuple, dict)) and len(value) > high:
        raise LimitExceeded(field, f"must have at most {high} entries, got {len(value)}")


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple))


def _flat(value: Any) -> Iterable[Any]:
    return value if _is_list(value) else [value]


def _num_prompts(obj: Any) -> int | None:
    """None: one prompt, which is no list of prompts. Raises LimitExceeded."""
    for prompts in (obj.text, obj.input_ids):
        if prompts is not None:
            several = _is_list(prompts) and not (prompts and isinstance(prompts[0], int))
            return len(prompts) if several else None
    embeds = obj.input_embeds
    if embeds is None:
        return None
    if not embeds or not embeds[0]:
        raise LimitExceeded("input_embeds", "must not be empty")
    return len(embeds) if _is_list(embeds[0][0]) else None


def _prompts_of_ids(input_ids: Any) -> Iterator[list[int]]:
    if input_ids and isinstance(input_ids[0], int):
        yield input_ids
    else:
        yield from input_ids or ()


def refuse_empty_prompt(manager: Any, obj: Any, input_ids: Any) -> None:
    """BEFORE TokenizerManager._validate_one_request: a prompt of no tokens kills the scheduler."""
    embeds = getattr(obj, "input_embeds", None)
    if input_ids is not None and len(input_ids) == 0 and not embeds:
        raise LimitExceeded("prompt", "must have at least one token")


async def _counted(items: AsyncIterator[Any], call: Call) -> AsyncIterator[Any]:
    """The same items; the call is told how many answers and tokens there are."""
    try:
        async with aclosing(items):  # type: ignore[type-var]
            async for item in items:
                for _, answer in answers_of(item):
                    meta = answer["meta_info"]
                    _check_followed(meta.get("finish_reason"))
                    count, request_id = meta.get("completion_tokens", 0), meta["id"]
                    call.tokens[request_id] = count
                    if meta.get("finish_reason") is not None and count:
                        _count(call, meta, count)
                yield item
    except HTTPException as error:  # how it says the same where nothing is streamed
        _check_followed({"message": error.detail})
        raise
    except ValueError as error:  # SGLang's way to say that a request is bad
        call.bad_value = str(error)
        raise


def _check_followed(finish_reason: Any) -> None:
    """A grammar that came to no end is the request's own mistake. Raises LimitExceeded."""
    said = grammars.failure((finish_reason or {}).get("message"))
    if said is not None:
        raise LimitExceeded("response_format", f"cannot be followed: {said}")


def _count(call: Call, meta: dict[str, Any], count: int) -> None:
    call.answers += 1
    annealing = meta.get(ANNEALING)
    if annealing is None and COLUMNS[0] not in meta:
        return
    schedule = annealing["schedule"] if annealing else "none"
    call.schedule = f"{schedule} step {annealing['step']}" if annealing else "recorded"
    metrics.count_answer(schedule, (annealing or {}).get("position_offset", 0), count, meta)
