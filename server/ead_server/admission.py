"""Every generation, whatever its route, on its way into the engine and out of it.

In: limits that SGLang does not have, each of which one request could otherwise kill the server with
(shared/RELIABILITY.md, B2), and request ids of our own. Out: what the log and the metrics say.
Only for requests that came through the guard of `ead serve`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing
from typing import Any

from ead_sampler.requests import ANNEALING, COLUMNS, answers_of
from ead_sampler.schedule import AnnealingError
from ead_server import metrics
from ead_server.guard import Call, current_call
from ead_server.settings import Settings

MAX_LOGIT_BIAS = 1024  # entries
MAX_STOP_LENGTH = 1024  # characters of a stop string or regex
MAX_STOP_TOKENS = 1024
MAX_TOKEN_IDS_LOGPROB = 1024
MAX_FLOAT = 1e9  # of any sampling parameter, either sign


class LimitExceeded(ValueError):
    """A request beyond a limit of this server: a 400. `field` names what is too large."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


def generate_request(
    original: Callable[..., AsyncIterator[Any]], manager: Any, obj: Any, request: Any = None
) -> AsyncIterator[Any]:
    """AROUND TokenizerManager.generate_request, outside `ead_sampler.requests.generate_request`.

    Raises LimitExceeded, which every route answers as a 400.
    """
    call = current_call.get()
    if call is None:
        return original(manager, obj, request)
    # SGLang aborts by prefix: a client that chose "a" could end every request that begins with it
    obj.rid = None
    if not hasattr(obj, "return_logprob"):  # an embedding
        return original(manager, obj, request)
    try:
        check_limits(obj, call.settings, manager.model_config.vocab_size)
        return _told(original(manager, obj, request), call)
    except (LimitExceeded, AnnealingError) as error:
        call.refused = "limit" if isinstance(error, LimitExceeded) else "schedule"
        raise


def check_limits(obj: Any, limits: Settings, vocab_size: int) -> None:
    """Raises LimitExceeded. obj: a GenerateReqInput as a route built it, not yet normalised."""
    if obj.custom_logit_processor:
        raise LimitExceeded(
            "custom_logit_processor",
            "is refused: it is code that this server would have to run; use `annealing`",
        )
    params = obj.sampling_params or {}
    each = params if isinstance(params, list) else [params]
    num_prompts = _num_prompts(obj)
    num_answers = 0
    for param in each:
        if not isinstance(param, dict):
            raise LimitExceeded("sampling_params", f"must be an object, got {param!r:.80}")
        n = param.get("n")
        n = 1 if n is None else n
        check_range("n", n, 1, limits.max_n)
        num_answers += n if len(each) > 1 else n * num_prompts
        for name in ("stop", "stop_regex"):
            strings = param.get(name) or ()
            _check_length(name, strings if _is_list(strings) else [strings], limits.max_stop)
            for string in strings if _is_list(strings) else [strings]:
                _check_length(name, string, MAX_STOP_LENGTH)
        _check_numbers(param)
        _check_length("stop_token_ids", param.get("stop_token_ids"), MAX_STOP_TOKENS)
        _check_length("logit_bias", param.get("logit_bias"), MAX_LOGIT_BIAS)
    if num_answers > limits.max_answers:
        raise LimitExceeded(
            "n", f"prompts times n must be at most {limits.max_answers}, got {num_answers}"
        )
    for number in _flat(obj.top_logprobs_num):
        check_range("top_logprobs_num", number, 0, limits.max_top_logprobs)
    _check_length("token_ids_logprob", obj.token_ids_logprob, MAX_TOKEN_IDS_LOGPROB)
    for token_ids in obj.token_ids_logprob or ():
        _check_length("token_ids_logprob", token_ids, MAX_TOKEN_IDS_LOGPROB)
    for token_ids in _prompts_of_ids(obj.input_ids):
        for token_id in (min(token_ids, default=0), max(token_ids, default=0)):
            if not 0 <= token_id < vocab_size:
                raise LimitExceeded(
                    "input_ids", f"must be token ids in [0, {vocab_size - 1}], got {token_id}"
                )


def check_range(field: str, value: object, low: int, high: int) -> None:
    """Raises LimitExceeded; None is absent."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise LimitExceeded(field, f"must be an integer in [{low}, {high}], got {value!r:.80}")


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


def _num_prompts(obj: Any) -> int:
    for prompts in (obj.text, obj.input_ids, obj.input_embeds):
        if _is_list(prompts) and prompts and not isinstance(prompts[0], (int, float)):
            return len(prompts)
    return 1


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


async def _told(items: AsyncIterator[Any], call: Call) -> AsyncIterator[Any]:
    """The same items; the call is told how many answers and tokens there are."""
    async with aclosing(items):  # type: ignore[type-var]
        async for item in items:
            for _, answer in answers_of(item):
                meta = answer["meta_info"]
                count, request_id = meta.get("completion_tokens", 0), meta["id"]
                call.tokens[request_id] = count
                if meta.get("finish_reason") is not None and count:
                    _count(call, meta, count)
            yield item


def _count(call: Call, meta: dict[str, Any], count: int) -> None:
    call.answers += 1
    annealing = meta.get(ANNEALING)
    if annealing is None and COLUMNS[0] not in meta:
        return
    schedule = annealing["schedule"] if annealing else "none"
    call.schedule = f"{schedule} step {annealing['step']}" if annealing else "recorded"
    metrics.count_answer(schedule, (annealing or {}).get("position_offset", 0), count, meta)
