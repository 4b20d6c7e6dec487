"""How `ead serve` ends: in time, with what it has begun, whether it was ready yet or not.

SIGTERM is taken by ours while the model loads, by uvicorn's handler while nothing was generated
yet, and by SGLang's from then on. SIGINT is always uvicorn's.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

from ead_server.asgi import Message, Receive
from ead_server.settings import current


def while_it_loads() -> None:
    """SIGTERM ends this process through its `finally`, and so its children, until uvicorn takes
    the signal; by default it would leave them, and do nothing in a container."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))


def when_a_child_dies() -> None:
    """SGLang sends its main process SIGQUIT then, and ends it there; but with several tokenizer
    workers uvicorn's supervisor has taken that signal, and would do nothing."""
    from sglang.srt.utils import kill_process_tree
    from uvicorn.supervisors import Multiprocess

    # the supervisor looks its handlers up by the signal's name
    Multiprocess.handle_quit = lambda _: kill_process_tree(os.getpid())  # type: ignore[attr-defined]


def while_it_starts(receive: Receive) -> Receive:
    """The app's lifespan events; a server that is not ready yet does not return from its last.

    uvicorn has finished with all clients by then, and listens no more. SGLang would wait for its
    warm-up, whose requests nobody answers: two minutes, or with several workers twelve.
    """

    async def received() -> Message:
        message = await receive()
        if message["type"] == "lifespan.shutdown" and _starting():
            from sglang.srt.utils import kill_process_tree

            kill_process_tree(os.getpid(), include_parent=False)
            os._exit(0)
        return message

    return received


def _starting() -> bool:
    from sglang.srt.entrypoints.http_server import get_global_state
    from sglang.srt.managers.tokenizer_manager import ServerStatus

    state = get_global_state()
    return state is not None and state.tokenizer_manager.server_status == ServerStatus.Starting


# --- hooks, see ead_sampler.plugin ----------------------------------------------------------------


def end_in_time(result: None, handler: Any, *received: Any) -> None:
    """AFTER SignalHandler.sigterm_handler: what is not finished in time is aborted.

    Its clients get what was generated, with the finish reason "abort".
    """
    settings = current()
    if settings is None:
        return
    manager = handler.tokenizer_manager
    manager.event_loop.call_later(settings.drain_seconds, lambda: _abort_all(manager))


def _abort_all(manager: Any) -> None:
    manager.abort_request(abort_all=True)
    manager.event_loop.call_later(1.0, lambda: _abort_all(manager))  # what was still queued


async def drain(original: Callable[..., Awaitable[None]], manager: Any) -> None:
    """AROUND TokenizerManager.sigterm_watchdog: warmed up first, and of several workers each alone.

    SGLang kills a process whose warm-up finds no server, and its own way of ending would take the
    scheduler with it, at which other workers are still at work.
    """
    from sglang.srt.managers.multi_tokenizer_mixin import TokenizerWorker

    settings = current()
    if settings is None:
        await original(manager)
        return
    while not manager.gracefully_exit:
        await asyncio.sleep(0.2)
    deadline = time.monotonic() + settings.drain_seconds
    while _starting() and time.monotonic() < deadline:
        await asyncio.sleep(0.2)
    if not isinstance(manager, TokenizerWorker):
        await original(manager)
        return
    while manager.rid_to_state:
        await asyncio.sleep(0.2)
    # uvicorn's to handle, as SIGTERM was until SGLang took it: it sends what is left, and ends
    signal.raise_signal(signal.SIGINT)
