"""SGLang's own ways to change weights, pause and flush, made as safe as ours: see the hooks in
`ead_server.plugin`."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from ead_server import settings
from ead_server.weights.update import Pause, in_transaction, served_weights

ABORT_SECONDS = 5.0  # for clients to read the ends of answers that are aborted


async def update_from_disk(
    original: Callable[..., Awaitable[Any]], manager: Any, obj: Any, request: Any = None
) -> tuple[bool, str, int]:
    """AROUND TokenizerManager.update_weights_from_disk: under `ead serve`, SGLang's own route is
    `Weights.from_disk`. Raises WeightsRefused.

    With several tokenizer workers, each of which knows of its own requests only, the same is
    checked, and the rest is SGLang's.
    """
    weights = served_weights()
    if weights is None or settings.current() is None or in_transaction.get():
        return await original(manager, obj, request)
    # or the new weights would go by the name of the old
    version = obj.weight_version or f"unnamed-{secrets.token_hex(4)}"
    if manager.server_args.tokenizer_worker_num > 1:
        folder = await asyncio.to_thread(weights.checked_folder, obj.model_path, "model_path")
        obj.model_path, obj.weight_version = str(folder.path), version
        obj.load_format = "safetensors"
        return await original(manager, obj, request)
    pause: Pause = "abort" if obj.abort_all_requests else "retract"
    recapture = obj.recapture_cuda_graph
    await weights.from_disk(obj.model_path, version, pause, "model_path", recapture=recapture)
    return True, f"Succeeded to update model weights. Weight version updated to {version}.", 0


async def pause_generation(
    original: Callable[..., Awaitable[None]], manager: Any, obj: Any
) -> None:
    """AROUND TokenizerManager.pause_generation, which in mode "abort" waits until every client has
    read the end of its answer: without an end where one does not read, as all calls behind it."""
    if obj.mode != "abort":
        return await original(manager, obj)
    with suppress(TimeoutError):  # everything has been told to end, and nothing new begins
        await asyncio.wait_for(original(manager, obj), ABORT_SECONDS)


async def flush_cache(
    original: Callable[..., Awaitable[Any]], manager: Any, timeout_s: float | None = None
) -> Any:
    """AROUND TokenizerManager.flush_cache, which looks at the first data-parallel rank only."""
    from sglang.srt.managers.io_struct import FlushCacheReqInput

    manager.auto_create_handle_loop()
    results = await manager.flush_cache_communicator(FlushCacheReqInput(timeout_s=timeout_s))
    failed = [result for result in results if not result.success]
    if not failed and manager.mm_processor is not None:
        manager.mm_processor.clear_preprocess_cache()
    return (failed or results)[0]
