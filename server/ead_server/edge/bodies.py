"""What a request's body must be, before anything is built of it or any work is done for it.

All of it is linear in the body, so large ones are looked at in a thread.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import orjson

from ead_server.edge.body_shape import Shape, shape_of
from ead_server.errors import BadField, LimitExceeded, RequestRefused

MAX_NESTING = 100  # Python's and orjson's own limits end in errors of the server
# SGLang reads its bodies between other clients' answers; ours are read in a thread.
SGLANGS = Shape(nesting=MAX_NESTING, containers=20_000, strings=100_000, values=2_000_000)
OURS = Shape(nesting=MAX_NESTING, containers=200_000, strings=1_000_000, values=20_000_000)
_COUNTED = {"containers": "lists and objects", "strings": "strings", "values": "values"}

# lists of which each entry is a prompt of its own
_PROMPTS = ("prompts", "prompt", "text", "documents", "items", "instances")
# what is not read as text: what comes back as it is, files, and grammars (which have limits)
_NO_TEXT = frozenset(
    {"metadata", "image_data", "video_data", "audio_data", "response_format", "sampling_params"}
)
_FILES = frozenset({"image_url", "video_url", "audio_url", "input_audio", "url", "data"})


def refused_shape(body: bytes, path: str, *, is_admin: bool) -> RequestRefused | None:
    """A body that would be much more in memory than it is as JSON."""
    limits = OURS if is_admin or path == "/v1/rollouts" else SGLANGS
    above = shape_of(body, limits).first_above(limits)
    if above is None:
        return None
    if above == "nesting":
        message = f"the body must be nested at most {MAX_NESTING} deep"
    else:
        message = f"the body must have at most {getattr(limits, above):,} {_COUNTED[above]}"
    return RequestRefused(message)


def refused_content(body: bytes, max_text: int | None) -> RequestRefused | None:
    """A text that cannot fit, or a name that is no template's variable.

    max_text: characters that can fit the model's context; None where that is not known.
    """
    long = max_text is not None and len(body) > max_text
    if not long and not may_name(body, "chat_template_kwargs"):
        return None
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None  # SGLang says so
    if not isinstance(request, dict):
        return None
    return _refused_template(request) or (_refused_texts(request, max_text) if max_text else None)


def may_name(body: bytes, *fields: str) -> bool:
    """Whether one of these may be a key in the JSON, which may spell its letters as escapes."""
    return rb"\u00" in body or any(field.encode() in body for field in fields)


def max_text(manager: Any) -> int | None:
    """Characters that can fit the context, were every token the longest; None: not known.

    manager: SGLang's TokenizerManager, or None.
    """
    if manager is None or manager.tokenizer is None or manager.server_args.allow_auto_truncate:
        return None
    return int(manager.model_config.context_len) * _longest_token(manager.tokenizer)


@cache
def _longest_token(tokenizer: Any) -> int:
    return max(map(len, tokenizer.get_vocab()), default=1)


def check_text(value: Any, limit: int | None, field: str) -> None:
    """Of a prompt that is looked at by itself. Raises LimitExceeded for more than can fit."""
    if limit is not None and (length := _characters(value)) > limit:
        raise LimitExceeded(field, _too_long(length, limit))


def _too_long(length: int, limit: int) -> str:
    return f"must have at most {limit:,} characters to fit the context, got {length:,}"


def _refused_texts(request: dict[str, Any], limit: int) -> RequestRefused | None:
    for name, value in request.items():
        if name in _NO_TEXT:
            continue
        each = name in _PROMPTS or _are_texts(value)
        for index, text in enumerate(value if each and isinstance(value, list) else [value]):
            if (length := _characters(text)) > limit:
                field = f"{name}.{index}" if each and isinstance(value, list) else name
                return RequestRefused(
                    f"{field}: {_too_long(length, limit)}", reason="too_large", field=field
                )
    return None


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _characters(value: Any) -> int:
    """Of all text in it."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        names = value.keys() - _NO_TEXT - _FILES
        return sum(_characters(value[name]) for name in names)
    if isinstance(value, list) and not (value and isinstance(value[0], int)):
        return sum(map(_characters, value))
    return 0


def _refused_template(request: dict[str, Any]) -> RequestRefused | None:
    """Names that are no template's variables: SGLang would hand them to the tokenizer, which fails,
    or fills memory with padding."""
    kwargs = request.get("chat_template_kwargs")
    for name in kwargs if isinstance(kwargs, dict) else ():
        if name in _tokenizers_own():
            field = f"chat_template_kwargs.{name}"
            return BadField(field, "is no variable of a template")
    return None


@cache
def _tokenizers_own() -> frozenset[str]:
    from transformers import PreTrainedTokenizerBase

    names = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"}
    # a template's own, and one that SGLang refuses itself, unless --trust-request-chat-template
    return frozenset(names - {"kwargs", "documents", "chat_template"})
