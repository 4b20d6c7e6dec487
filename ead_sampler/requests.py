"""What happens to a request in SGLang's tokenizer process, before and after the scheduler.

A request says what it wants in `sampling_params`: `annealing` (a schedule; null: none, not even the
server's default) and `rollout` (true: return the arrays also without a schedule; false: not even
with one). Both are checked here, moved into SGLang's `custom_params`, which travels to the
scheduler, and answered with a marker that says what was applied. The hooks that call these
functions are listed in `ead_sampler.plugin`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any, NamedTuple

from ead_sampler.defaults import default_annealing, shared_defaults, with_step
from ead_sampler.schedule import AnnealingError, parse_annealing, shown

ANNEALING = "annealing"
ROLLOUT = "rollout"
SAMPLING = "sampling"
# in custom_params: how many of the prompt's last tokens are the answer's beginning
CONTINUED = "continued"
# What the sampler records of every token, under these names in `meta_info` and in every answer.
COLUMNS = ("temperatures", "logprobs", "model_logprobs")
ENTROPIES = "entropies"
_RECORDED = (*COLUMNS, ENTROPIES)
MARKERS = (ANNEALING, SAMPLING)  # added to meta_info of every answer that has the arrays

# What SGLang takes for a request without one under --enable-deterministic-inference, where answers
# to one prompt would otherwise be copies of each other.
SEED = 42

TOP_K_ALL = 1 << 30  # SGLang's "no top_k"

# Called with the choice index and every item that TokenizerManager.generate_request yields for the
# current HTTP request; set by the HTTP layer, which has no other way to see items behind the OpenAI
# routes.
observe_items: ContextVar[Callable[[int, dict[str, Any]], None] | None] = ContextVar(
    "ead_observe_items", default=None
)


def asked(custom_params: Any) -> bool:
    """Whether SGLang's custom_params ask for annealing or a rollout; null and false do not."""
    if not isinstance(custom_params, dict):
        return False
    rollout = custom_params.get(ROLLOUT)
    nothing = rollout is None or rollout is False  # not `in (None, False)`: 0 is a mistake
    return custom_params.get(ANNEALING) is not None or not nothing


def wants_arrays(custom_params: Any) -> bool:
    """Whether an answer carries the arrays: if something is asked and rollout is not false."""
    return asked(custom_params) and custom_params.get(ROLLOUT) is not False


# --- checks ----------------------------------------------------------------------------------


def check_rollout(raw: object) -> bool | dict[str, bool]:
    """The `rollout` field: true, false (or null) or {"entropies": bool}. Raises AnnealingError."""
    if raw is None:
        return False
    if isinstance(raw, bool):
        return raw
    if isinstance(raw, dict) and set(raw) <= {"entropies"}:
        if isinstance(raw.get("entropies", False), bool):
            return dict(raw)
        raise AnnealingError(
            "rollout.entropies", f"must be a boolean, got {shown(raw['entropies'])}"
        )
    raise AnnealingError(ROLLOUT, 'must be a boolean or {"entropies": true}')


def check_sampling(params: Mapping[str, Any]) -> None:
    """With a schedule, the temperature is the schedule's alone. Raises AnnealingError."""
    temperature, top_k = params.get("temperature"), params.get("top_k")
    if temperature is not None and temperature != 1:
        raise AnnealingError(
            "temperature",
            f"must be absent or 1 together with annealing, got {shown(temperature)}",
        )
    if top_k == 1:
        raise AnnealingError("top_k", "must not be 1 (greedy) together with annealing")
    check_beam_width(params.get("beam_width"))


def check_beam_width(beam_width: object) -> None:
    """Neither a schedule nor a rollout goes with beam search. Raises AnnealingError."""
    if beam_width is not None and beam_width != 1:
        raise AnnealingError("beam_width", "beam search does not sample: must be 1 or absent")


def verify_sampling_params(result: None, params: Any, vocab_size: int) -> None:
    """AFTER SamplingParams.verify: SGLang's own check of every request, on every route.

    Also reached by requests that put the schedule into `custom_params` themselves. A ValueError
    here is a clean 400; the same mistake in the scheduler would kill the server. From here the
    schedule travels as one string: SGLang's messages have no place for lists in lists.
    """
    custom = params.custom_params
    if asked(custom):
        check_rollout(custom.get(ROLLOUT))
        if custom.get(ANNEALING) is not None:
            schedule = parse_annealing(sent_schedule(custom))
            check_sampling({"temperature": params.temperature, "top_k": params.top_k})
            custom = {**custom, ANNEALING: schedule.model_dump_json()}
            params.custom_params = custom
        check_beam_width(params.beam_width)
        check_server_mode(custom)
    check_travels(custom)


def sent_schedule(custom_params: Mapping[str, Any]) -> Any:
    """The schedule in them, as an object again where it travelled. Raises AnnealingError."""
    raw = custom_params.get(ANNEALING)
    if not isinstance(raw, str):
        return raw
    try:
        return json.loads(raw)
    except (json.JSONDecodeError, RecursionError):
        raise AnnealingError(ANNEALING, f"must be an object, got {shown(raw)}") from None


def check_travels(custom_params: Any) -> None:
    """With SGLANG_USE_PICKLE_IPC=0 the scheduler dies of custom_params that are no flat JSON.

    Raises AnnealingError.
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
        raise AnnealingError("custom_params", message) from None


_PICKLE = "SGLANG_USE_PICKLE_IPC"  # environment, of SGLang


def check_server_mode(asked_for: Mapping[str, Any]) -> None:
    """Refuse a schedule or rollout in server modes that cannot honour it. Raises AnnealingError.

    asked_for: custom_params, or anything else that has `annealing` if a schedule is asked for.
    """
    from sglang.srt.runtime_context import get_server_args

    reason = unsupported_mode(get_server_args(), os.environ)
    if reason is not None:
        field = ROLLOUT if asked_for.get(ANNEALING) is None else ANNEALING
        raise AnnealingError(field, f"this server cannot honour it: {reason}")


def check_generates(manager: Any) -> None:
    """Refuse to generate on a server that embeds: its scheduler would die of it.

    manager: SGLang's TokenizerManager. Raises AnnealingError.
    """
    if not manager.is_generation:
        raise AnnealingError("model", "does not generate on this server, it embeds")


def unsupported_mode(server_args: Any, environ: Mapping[str, str]) -> str | None:
    """Why a server started like this cannot anneal, or None. See DESIGN.md, "refused"."""
    if server_args.speculative_algorithm is not None:
        return "speculative decoding samples outside the sampler (--speculative-algorithm)"
    if server_args.dllm_algorithm is not None:
        return "diffusion language models have their own sampler (--dllm-algorithm)"
    if server_args.disaggregation_mode not in (None, "null"):
        return "the first token is sampled by another server (--disaggregation-mode)"
    if server_args.pp_size > 1:
        return "recorded values do not cross pipeline stages (--pp-size)"
    if server_args.enable_pdmux:
        return "two streams sample at a time (--enable-pdmux)"
    if server_args.rl_on_policy_target is not None:
        return "--rl-on-policy-target computes its own bfloat16 log-probabilities"
    backend = server_args.sampling_backend
    if backend is not None and backend not in SAMPLING_BACKENDS:
        return f"the {backend} sampling backend hides its probabilities (--sampling-backend)"
    if environ.get("SGLANG_RETURN_ORIGINAL_LOGPROB", "").lower() in ("1", "true", "yes"):
        return "SGLANG_RETURN_ORIGINAL_LOGPROB reports log-probabilities at temperature 1"
    return None


# --- the request's way through the tokenizer manager -------------------------------------------


# of the schedules of one request, together
MAX_MEANS = 2_000_000  # tokens of `mean_matched`: 60 ms
MAX_STRINGS = 1_024  # that mark tokens


def check_cost(each: Sequence[Any]) -> None:
    """Refuse schedules that are dear to work out and are many. Raises AnnealingError.

    each: sampling parameters of each prompt, with the schedule in them or in `custom_params`.
    """
    if len(each) <= 1:
        return
    means: dict[str, int] = {}
    strings: set[str] = set()
    for params in each:
        custom = params.get("custom_params") if isinstance(params, dict) else None
        for holder in (params, custom):
            raw = holder.get(ANNEALING) if isinstance(holder, dict) else None
            if not isinstance(raw, dict):
                continue
            for part in (raw, raw.get("thinking"), raw.get("answer")):
                matched = part.get("mean_matched") if isinstance(part, dict) else None
                tokens = matched.get("tokens") if isinstance(matched, dict) else None
                if isinstance(tokens, int):
                    means[repr(part)] = tokens
            for name in ("restart_strings", "end_of_thinking_strings"):
                marks = raw.get(name)
                strings |= (
                    {m for m in marks if isinstance(m, str)} if isinstance(marks, list) else set()
                )
    if sum(means.values()) > MAX_MEANS:
        raise AnnealingError(
            "annealing.mean_matched.tokens",
            f"of all different schedules of a request must add up to at most {MAX_MEANS:,}, "
            f"got {sum(means.values()):,}",
        )
    if len(strings) > MAX_STRINGS:
        raise AnnealingError(
            "annealing.restart_strings",
            f"must be at most {MAX_STRINGS:,} different ones in a request, got {len(strings):,}",
        )


def seed_each_answer(obj: Any, default: int | None = None) -> list[dict[str, Any]] | None:
    """Give each answer of a seeded request a seed of its own, which counts up from the request's.

    SGLang gives all of them the same one, and so n copies of one answer. A request for n becomes
    one for n prompts, in the order that SGLang's answers have. Prompt by prompt, if the request
    has parameters (and seeds) for each. default: of requests without one. Returns the parameters
    of all, or None if nothing changed.
    """
    own = isinstance(obj.sampling_params, list)
    each = obj.sampling_params if own else [obj.sampling_params or {}]
    seeds = [p.get("sampling_seed") for p in each]
    seeds = [default if seed is None else seed for seed in seeds]
    name = "text" if obj.text is not None else "input_ids"
    prompts = getattr(obj, name)
    several = isinstance(prompts, list) and not (prompts and isinstance(prompts[0], int))
    n = each[0].get("n") or 1
    if not prompts or not any(type(seed) is int for seed in seeds):
        return None
    if (n == 1 and (own or not several)) or any((p.get("n") or 1) != n for p in each):
        return None
    prompts = prompts if several else [prompts]
    params = []
    for number in range(len(prompts)):
        base, seed = (each[number], seeds[number]) if own else (each[0], seeds[0])
        for sample in range(n):
            place = sample if own else number * n + sample
            params.append({**base, "n": 1, "sampling_seed": _counted_up(seed, place)})
    for field in dataclasses.fields(obj):
        value = prompts if field.name == name else getattr(obj, field.name)
        if field.name == name or (several and _of_each_prompt(field.name, value, len(prompts))):
            setattr(obj, field.name, [item for item in value for _ in range(n)])
    obj.sampling_params = params
    return params


def _counted_up(seed: int | None, by: int) -> int | None:
    """Within 64 bits, from the highest on to the lowest."""
    return seed if type(seed) is not int else (seed + by + 2**63) % 2**64 - 2**63


def _of_each_prompt(name: str, value: object, num_prompts: int) -> bool:
    if not isinstance(value, list) or len(value) != num_prompts:
        return False
    return name != "token_ids_logprob" or not isinstance(value[0], int)  # these are for all


def into_custom_params(params: dict[str, Any]) -> dict[str, Any]:
    """Sampling parameters with `annealing` and `rollout` checked and moved to `custom_params`.

    Returns `params` itself when neither is said, else a copy. Raises AnnealingError.
    """
    if ANNEALING not in params and ROLLOUT not in params:
        return params
    params = dict(params)
    moved = {field: params.pop(field) for field in (ANNEALING, ROLLOUT) if field in params}
    if moved.get(ANNEALING) is not None:
        check_sampling(params)
        moved[ANNEALING] = parse_annealing(moved[ANNEALING]).model_dump()
        params["temperature"] = 1.0  # or a model's generation_config would set another
    check_rollout(moved.get(ROLLOUT))
    if asked(moved):
        check_server_mode(moved)
    custom = params.get("custom_params") or {}
    if not isinstance(custom, dict):
        raise AnnealingError("custom_params", f"must be an object, got {shown(custom)}")
    params["custom_params"] = {**custom, **moved}
    return params


def with_default(params: dict[str, Any]) -> dict[str, Any]:
    """Sampling parameters that say nothing of `annealing`, with the server's default schedule.

    Only where nothing but temperature 1 was asked for: greedy decoding and temperatures of their
    own are choices, an evaluation's perhaps. The arrays are not added to such an answer, since
    whoever did not ask does not read them. Returns `params` itself when nothing changes.
    """
    custom = params.get("custom_params") or {}
    default = default_annealing()
    if default is None or ANNEALING in params or not isinstance(custom, dict):
        return params  # what is malformed is for SGLang to refuse
    if ANNEALING in custom:
        return params
    try:
        check_sampling(params)
    except AnnealingError:
        return params
    rollout = params.get(ROLLOUT, custom.get(ROLLOUT)) or False
    return {**params, ANNEALING: default, ROLLOUT: rollout}


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
    if not any(asked(p.get("custom_params")) for p in each):
        return original(manager, obj, request)
    if observe_items.get() is not None:
        obj.return_prompt_token_ids = True
    return _marked(original(manager, obj, request), manager, obj, each)


async def _marked(
    items: Any, manager: Any, obj: Any, each: list[dict[str, Any]]
) -> AsyncIterator[Any]:
    """The same items, their meta_info saying which schedule and which cuts were applied."""
    markers = [
        (_markers(p, manager) if asked(custom) else {}, wants_arrays(custom))
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


def answers_of(item: Any) -> Iterable[tuple[int, dict[str, Any]]]:
    """(choice index, answer) of what generate_request yields: one answer, or all of a batch."""
    return enumerate(item) if isinstance(item, list) else ((item.get("index") or 0, item),)


def _completed(params: dict[str, Any], manager: Any) -> dict[str, Any]:
    """A schedule with the server's training step, if it has none, and its strings as tokens."""
    custom = params.get("custom_params")
    if not isinstance(custom, dict) or not isinstance(custom.get(ANNEALING), dict):
        return params
    schedule = parse_annealing(with_step(custom[ANNEALING])).resolved(
        getattr(manager, "tokenizer", None)
    )
    return {**params, "custom_params": {**custom, ANNEALING: schedule.model_dump()}}


class SamplingBackend(NamedTuple):
    """What SGLang's Sampler._sample_from_probs does in one of its ways."""

    # takes seeds without deterministic mode, to which SGLang itself confines them
    takes_seeds: bool
    # with min_p, top_p counts within what top_k left, rather than within the whole vocabulary
    renormalises: bool


SAMPLING_BACKENDS = {
    "pytorch": SamplingBackend(takes_seeds=True, renormalises=False),
    "flashinfer": SamplingBackend(takes_seeds=False, renormalises=True),
    "intel_xpu": SamplingBackend(takes_seeds=False, renormalises=True),
}


def honours_seeds(sampling_backend: str | None, *, deterministic: bool = False) -> bool:
    """Whether a request's `sampling_seed` decides its tokens."""
    backend = SAMPLING_BACKENDS.get(sampling_backend or "")
    return deterministic or (backend is not None and backend.takes_seeds)


def _markers(params: dict[str, Any], manager: Any) -> dict[str, Any]:
    """`annealing`: the schedule in full, or None; `sampling`: the cuts that were in effect, and
    the seed if one was given: null where this server cannot honour it."""
    schedule = (params.get("custom_params") or {}).get(ANNEALING)
    effective = {**(manager.preferred_sampling_params or {}), **params}
    top_k, seed = effective.get("top_k"), effective.get("sampling_seed")
    sampling = {
        "top_p": _number(effective.get("top_p"), 1.0),
        "top_k": -1 if top_k in (None, TOP_K_ALL) else top_k,
        "min_p": _number(effective.get("min_p"), 0.0),
    }
    if seed is not None:
        args = manager.server_args
        honoured = honours_seeds(
            args.sampling_backend, deterministic=args.enable_deterministic_inference
        )
        sampling["seed"] = seed if honoured else None
    return {ANNEALING: schedule, SAMPLING: sampling}


def _number(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def drop_empty_columns(
    original: Callable[..., None],
    manager: Any,
    meta_info: dict[str, Any],
    state: Any,
    customized_info: dict[str, list[Any]],
    index: int,
    finish_reason: dict[str, Any] | None,
) -> None:
    """AROUND TokenizerManager.update_request_meta_info.

    Once one request of a payload has our columns, SGLang gives every other request in it columns
    of None: an answer that did not ask must not grow fields.
    """
    wanted = {
        name: values
        for name, values in customized_info.items()
        if name not in _RECORDED or (values[index] and values[index][0] is not None)
    }
    original(manager, meta_info, state, wanted, index, finish_reason)


def keep_columns_of_aborted(original: Callable[..., None], manager: Any, recv_obj: Any) -> None:
    """AROUND TokenizerManager._handle_abort_req.

    How SGLang ends a request that waits: one that was retracted has tokens already, and this
    answer tells them, but not what was recorded of them.
    """
    state = manager.rid_to_state.get(recv_obj.rid)
    original(manager, recv_obj)
    if state is None or not state.out_list:
        return
    answer = state.out_list[-1]
    meta = answer["meta_info"]
    end = meta["completion_tokens"]
    start = end - len(answer["output_ids"])  # a stream may be told only the last
    for name in _RECORDED:
        if name in state.customized_info_accumulated:
            meta[name] = state.customized_info_accumulated[name][start:end]


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
