"""Long texts to tokens in a thread: SGLang makes them between other clients' answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request, Response
from pydantic import BaseModel

from ead_server.calls import current_call
from ead_server.edge.limits import check_token_ids

LONG = 64 << 10  # bytes of a call's body; as many characters take some 20 ms


async def in_a_thread(
    original: Callable[..., Coroutine[Any, Any, Any]], *args: Any, **keys: Any
) -> Any:
    """AROUND SGLang's coroutines that wait for nothing: of a long call, in a thread.

    The tokenizer gives up Python's lock while it works. Not where SGLang has a queue for it
    (--enable-dynamic-batch-tokenizer), which is bound to the event loop.
    """
    call = current_call.get()
    manager = getattr(args[0], "tokenizer_manager", args[0])
    queued = manager.async_dynamic_batch_tokenizer is not None
    if call is None or call.bytes_in < LONG or queued:
        return await original(*args, **keys)

    def work() -> Any:
        result = asyncio.run(original(*args, **keys))
        # FastAPI would write an answer with millions of numbers between other clients' answers
        answers_a_call = isinstance(args[-1], Request) and isinstance(result, BaseModel)
        return _written(result) if answers_a_call else result

    return await asyncio.to_thread(work)


def _written(answer: BaseModel) -> Response:
    return Response(orjson.dumps(answer.model_dump()), media_type="application/json")


async def detokenize(
    original: Callable[..., Coroutine[Any, Any, Any]], serving: Any, adapted: Any, *args: Any
) -> Any:
    """AROUND OpenAIServingDetokenize._handle_non_streaming_request. Raises LimitExceeded for ids
    that the model has not, of which the tokenizer makes an error of the server."""
    tokens = adapted.tokens
    for ids in tokens if tokens and isinstance(tokens[0], list) else [tokens]:
        check_token_ids(ids, serving.tokenizer_manager.model_config.vocab_size, "tokens")
    return await in_a_thread(original, serving, adapted, *args)
