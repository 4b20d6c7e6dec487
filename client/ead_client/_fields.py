"""Fields of a request: a schedule by its name, and keywords that are another one mistyped."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from ead_client._types import Json, Preset
from ead_client.errors import NotSendable

PRESETS: tuple[str, ...] = get_args(Preset)

# Keywords of our calls, OpenAI's fields, and SGLang's: what a mistyped keyword may have meant
_KNOWN = frozenset(
    [
        "annealing",
        "rollout",
        "entropies",
        "texts",
        "idempotency_key",
        "prompts",
        "sampling_params",
        "audio",
        "best_of",
        "echo",
        "frequency_penalty",
        "function_call",
        "functions",
        "logit_bias",
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "messages",
        "metadata",
        "modalities",
        "model",
        "n",
        "parallel_tool_calls",
        "prediction",
        "presence_penalty",
        "prompt",
        "prompt_cache_key",
        "prompt_cache_retention",
        "reasoning_effort",
        "response_format",
        "safety_identifier",
        "seed",
        "service_tier",
        "stop",
        "store",
        "stream",
        "stream_options",
        "suffix",
        "temperature",
        "tool_choice",
        "tools",
        "top_logprobs",
        "top_p",
        "user",
        "verbosity",
        "web_search_options",
        "beam_width",
        "cache_salt",
        "chat_template_kwargs",
        "continue_final_message",
        "custom_labels",
        "custom_logit_processor",
        "custom_params",
        "data_parallel_rank",
        "ebnf",
        "extra_key",
        "ignore_eos",
        "json_schema",
        "lora_path",
        "max_new_tokens",
        "min_new_tokens",
        "min_p",
        "min_tokens",
        "no_stop_trim",
        "priority",
        "regex",
        "repetition_penalty",
        "return_hidden_states",
        "return_token_ids",
        "rid",
        "sampling_seed",
        "separate_reasoning",
        "session_id",
        "session_params",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "stop_regex",
        "stop_token_ids",
        "stream_reasoning",
        "structural_tag",
        "task",
        "thinking",
        "top_k",
    ]
)
# How alike two names are, of difflib: `max_tokns` and `max_tokens` are 0.95 alike, while top_k and
# top_p, which are two fields, are 0.8
_ALIKE = 0.85


def check_keywords(keywords: Iterable[str]) -> None:
    """Raises NotSendable for a keyword that is nearly one that is known: the server might ignore
    it. All others are the server's fields, and for it to check."""
    for name in keywords:
        if name in _KNOWN:
            continue
        nearest = difflib.get_close_matches(name.lower(), sorted(_KNOWN), n=1, cutoff=_ALIKE)
        if nearest:
            raise NotSendable(name, f"is not a known field; did you mean {nearest[0]}?")


def named_schedule(text: str) -> Json:
    """The schedule that a text names: JSON, the name of a preset such as "paper", or that of a kind
    such as "cosine", which the server checks. Raises NotSendable for a text that is no JSON."""
    text = text.strip()
    if not text.startswith("{"):
        return {"preset" if text in PRESETS else "schedule": text}
    try:
        return dict(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise NotSendable("annealing", f"is not valid JSON ({error}): {text:.200}") from None


def schedule_object(annealing: Mapping[str, Any] | str | None) -> Json | None:
    """The `annealing` object of a request. Raises NotSendable."""
    if isinstance(annealing, str):
        return named_schedule(annealing)
    if annealing is None:
        return None
    if hasattr(annealing, "model_dump"):  # what ead_sampler.suggest_schedule gives
        return dict(annealing.model_dump(exclude_none=True))
    if not isinstance(annealing, Mapping):
        raise NotSendable(
            "annealing",
            "must be an object such as {'preset': 'paper'}, the name of a preset or of a kind of "
            f"schedule, or None, got {annealing!r:.100}",
        )
    return dict(annealing)


def record(rollout: bool | Mapping[str, bool]) -> bool | Json:
    """The `rollout` field of a request. Raises NotSendable."""
    if isinstance(rollout, bool):
        return rollout
    if not isinstance(rollout, Mapping):
        raise NotSendable(
            "rollout", f"must be true, false or {{'entropies': true}}, got {rollout!r:.100}"
        )
    return dict(rollout)
