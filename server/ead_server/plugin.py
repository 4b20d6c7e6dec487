"""The entry point for SGLang: checks what this project touches in it, and extends it.

SGLang finds `load` through the entry-point group `sglang.srt.plugins` and calls it in each of its
processes. Besides the hooks (`ead_sampler.hooks`, `ead_server.hooks`), middlewares and routes are
added to SGLang's FastAPI app (`ead_server.app`), and on a machine without an accelerator SGLang's
CPU engine is switched on (`ead_sampler.device`).
"""

from __future__ import annotations

import importlib
import inspect
import logging
import multiprocessing
import os
import pkgutil
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import ead_sampler.hooks
import ead_server.hooks
from ead_sampler.hooks import Hook
from ead_server.hooks import HTTP_SERVER

logger = logging.getLogger(__name__)

SUPPORTED_SGLANG = "0.5.23"
_APP = "ead_server.app"


# Of two that wrap the same function the later one is the outer one: limits are checked before
# anything is made of a request, and an update from disk is checked before it is counted.
HOOKS = (*ead_sampler.hooks.HOOKS, *ead_server.hooks.HOOKS)


def load() -> None:
    """Entry point: register the hooks. It is in every environment that has any part of ead.

    An SGLang that cannot be extended starts as it is, with one loud warning, unless annealing was
    asked for, by `ead serve`, REQUIRED or a default schedule: then this process stops with the
    reason. SGLang only logs an exception of a plugin and would then serve without annealing,
    silently; hence SystemExit.
    """
    serves_http = _serves_http()  # before our checks, which import all of SGLang
    problems = _foreign() or _cannot_import(serves_http=serves_http)
    if not problems:
        from ead_sampler import device

        logger.info("device: %s", device.choose())
        problems = check_sglang()
    if problems:
        _leave_unextended(problems)
        return
    if problems := _bad_default():
        raise SystemExit(f"ead: {problems[0]}")
    _extend(serves_http=serves_http)


def _extend(*, serves_http: bool) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from ead_sampler.defaults import shared_defaults

    # all of them found before the first is registered: whole, or not at all
    found = [(hook, _resolve(hook.ours)) for hook in HOOKS]
    for hook, ours in found:
        HookRegistry.register(hook.target, ours, HookType[hook.kind])
    if serves_http:
        importlib.import_module(_APP).install()
        shared_defaults()  # made here, before any worker process that shares it
        # With several tokenizer workers, uvicorn imports its app by this name in each of them.
        os.environ.setdefault("SGLANG_HTTP_SERVER_APP_PATH", "ead_server.launch.worker:app")
    if _SERVED in os.environ and multiprocessing.parent_process() is not None:
        watch = importlib.import_module("ead_server.lifecycle.watch")
        watch.start_in_engine()
        if not serves_http:
            watch.ignore_what_is_for_the_main_process()


# --- may it be extended? ----------------------------------------------------------------------

REQUIRED = "EAD_REQUIRE"  # environment: "1" stops an SGLang that cannot be extended
_SERVED = "EAD_SETTINGS"  # environment: set by `ead serve` alone, see ead_server.settings
_DEFAULT_ANNEALING = "EAD_ANNEALING"  # environment: see ead_sampler.defaults
_TOLD = "EAD_TOLD_UNEXTENDED"  # environment: the warning has been given, in this process's family


def _leave_unextended(problems: list[str]) -> None:
    environ = os.environ
    asked = environ.get(REQUIRED, "").lower() in _TRUE or _SERVED in environ
    if asked or environ.get(_DEFAULT_ANNEALING, "").strip():
        raise SystemExit("ead cannot extend this SGLang:\n  " + "\n  ".join(problems))
    if _TOLD not in environ:
        environ[_TOLD] = "1"
        print(
            f"ead: WARNING: SGLang starts without ead: {'; '.join(problems)}. `annealing` and "
            "`rollout` in requests are ignored, and /v1/rollouts, /v1/annealing and /v1/weights do "
            f"not exist. {REQUIRED}=1 stops it instead; SGLANG_PLUGINS=none silences this.",
            file=sys.stderr,
            flush=True,
        )


def check_sglang() -> list[str]:
    """What is wrong with the installed SGLang, hook by hook; empty when all is as expected."""
    return _foreign() or [problem for hook in HOOKS if (problem := _check(hook))]


def _foreign() -> list[str]:
    """Whether this is another SGLang than ours: found without importing it, or anything heavy."""
    try:
        found = version("sglang")
    except PackageNotFoundError:
        return [f"sglang is not installed; ead supports sglang {SUPPORTED_SGLANG}"]
    if found != SUPPORTED_SGLANG:
        return [f"found sglang {found}; this version of ead supports sglang {SUPPORTED_SGLANG}"]
    if os.environ.get("SGLANG_RUST_SERVER", "").lower() in _TRUE:
        return ["SGLANG_RUST_SERVER replaces the HTTP server that ead extends; unset it"]
    return []


_TRUE = ("1", "true", "yes", "y")  # as SGLang reads them


def _cannot_import(*, serves_http: bool) -> list[str]:
    """What our own modules need and this environment lacks. The routes are left to the processes
    that serve them: the engine's have no use for what they import."""
    needed = {hook.ours.partition(":")[0] for hook in HOOKS} | ({_APP} if serves_http else set())
    try:
        for module in sorted(needed):
            importlib.import_module(module)
    except ImportError as error:
        return [f"this environment lacks what ead[server] needs ({error})"]
    return []


def _bad_default() -> list[str]:
    from ead_sampler.defaults import default_annealing
    from ead_sampler.schedules import AnnealingError

    try:
        default_annealing()
    except AnnealingError as error:
        return [f"{_DEFAULT_ANNEALING} (ead serve --annealing): {error}"]
    return []


def hooks_not_in_place() -> list[str]:
    """Targets that are not wrapped in this process, after SGLang has loaded its plugins."""
    missing = []
    for hook in HOOKS:
        wrappers, ours = _resolve(hook.target), _resolve(hook.ours)
        while wrappers is not None and not _closes_over(wrappers, ours):
            wrappers = getattr(wrappers, "__wrapped__", None)
        if wrappers is None:
            missing.append(hook.target)
    return missing


def _check(hook: Hook) -> str | None:
    try:
        target = _resolve(hook.target)
    except (ImportError, AttributeError) as error:
        return f"{hook.target} is gone ({error}); it is needed because {hook.why}"
    names = " ".join(inspect.signature(target).parameters)
    if names != hook.parameters:
        return f"{hook.target} takes ({names}), expected ({hook.parameters})"
    return None


def _resolve(name: str) -> Any:
    return pkgutil.resolve_name(name)


def _closes_over(wrapper: Any, function: Any) -> bool:
    """Whether `wrapper` is SGLang's wrapping of `function`."""
    cells = getattr(wrapper, "__closure__", None) or ()
    return any(cell.cell_contents is function for cell in cells)


def _serves_http() -> bool:
    """Whether this process may run the HTTP server: the launcher, or one that imported it.

    Trainers start servers in child processes, and load the HTTP module before the plugins; the
    scheduler and detokenizer processes never load it.
    """
    return multiprocessing.parent_process() is None or HTTP_SERVER in sys.modules
