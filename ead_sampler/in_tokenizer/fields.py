"""The fields of a request that are ours, the arrays of an answer, and what is done with both.

A request says what it wants in `sampling_params`: `annealing` (a schedule; null: none, not even the
server's default) and `rollout` (true: return the arrays also without a schedule; false: not even
with one). Both are checked here, and moved into SGLang's `custom_params`, which travels to the
scheduler.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from ead_sampler.defaults import default_annealing
from ead_sampler.in_tokenizer.server_mode import check_server_mode
from ead_sampler.names import ANNEALING, ROLLOUT
from ead_sampler.schedules import (
    AnnealingError,
    FieldError,
    check_sampling,
    parse_annealing,
    short_repr,
)

# Called with the choice index and every item that TokenizerManager.generate_request yields for the
# current HTTP request; set by the HTTP layer, which has no other way to see items behind the OpenAI
# routes.
observe_items: ContextVar[Callable[[int, dict[str, Any]], None] | None] = ContextVar(
    "ead_observe_items", default=None
)


def is_requested(custom_params: Any) -> bool:
    """Whether SGLang's custom_params ask for annealing or a rollout; null and false do not."""
    if not isinstance(custom_params, dict):
        return False
    rollout = custom_params.get(ROLLOUT)
    nothing = rollout is None or rollout is False  # not `in (None, False)`: 0 is a mistake
    return custom_params.get(ANNEALING) is not None or not nothing


def wants_arrays(custom_params: Any) -> bool:
    """Whether an answer carries the arrays: if something is asked and rollout is not false."""
    return is_requested(custom_params) and custom_params.get(ROLLOUT) is not False


def check_rollout(raw: object) -> bool | dict[str, bool]:
    """The `rollout` field: true, false (or null) or {"entropies": bool}. Raises FieldError."""
    if raw is None:
        return False
    if isinstance(raw, bool):
        return raw
    if isinstance(raw, dict) and set(raw) <= {"entropies"}:
        if isinstance(raw.get("entropies", False), bool):
            return dict(raw)
        raise FieldError(
            "rollout.entropies", f"must be a boolean, got {short_repr(raw['entropies'])}"
        )
    raise FieldError(ROLLOUT, 'must be a boolean or {"entropies": true}')


def sent_schedule(custom_params: Mapping[str, Any]) -> Any:
    """The schedule in them, as an object again where it travelled. Raises AnnealingError."""
    raw = custom_params.get(ANNEALING)
    if not isinstance(raw, str):
        return raw
    try:
        return json.loads(raw)
    except (json.JSONDecodeError, RecursionError):
        raise AnnealingError(ANNEALING, f"must be an object, got {short_repr(raw)}") from None


def into_custom_params(params: dict[str, Any]) -> dict[str, Any]:
    """Sampling parameters with `annealing` and `rollout` checked and moved to `custom_params`.

    Returns `params` itself when neither is said, else a copy. Raises FieldError.
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
    if is_requested(moved):
        check_server_mode(moved)
    custom = params.get("custom_params") or {}
    if not isinstance(custom, dict):
        raise FieldError("custom_params", f"must be an object, got {short_repr(custom)}")
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
    except FieldError:
        return params
    rollout = params.get(ROLLOUT, custom.get(ROLLOUT)) or False
    return {**params, ANNEALING: default, ROLLOUT: rollout}
