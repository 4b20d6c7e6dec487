"""What answers say of how they were sampled, and the columns of the arrays in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ead_sampler.in_tokenizer.server_mode import honours_seeds
from ead_sampler.names import ANNEALING, RECORDED, SAMPLING

TOP_K_ALL = 1 << 30  # SGLang's "no top_k"


def answers_of(item: Any) -> Iterable[tuple[int, dict[str, Any]]]:
    """(choice index, answer) of what generate_request yields: one answer, or all of a batch."""
    return enumerate(item) if isinstance(item, list) else ((item.get("index") or 0, item),)


def markers_of(params: dict[str, Any], manager: Any) -> dict[str, Any]:
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
        if name not in RECORDED or (values[index] and values[index][0] is not None)
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
    for name in RECORDED:
        if name in state.customized_info_accumulated:
            meta[name] = state.customized_info_accumulated[name][start:end]
