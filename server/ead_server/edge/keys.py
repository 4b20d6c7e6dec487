"""Who may call what.

Health is open. Everything else needs the API key where one is set, whatever the method, and so do
apps that are mounted on this one. What changes the server (weights, schedule, step, pauses, aborts,
profiles: what SGLang marks as admin, our own, and sessions, which hold memory) needs the admin key,
and is closed where none is set; the admin key opens everything.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Any

from ead_server.asgi import all_routes
from ead_server.errors import RequestRefused
from ead_server.settings import Settings

PAGE = "/annealing"  # says nothing that is not in this repository
OPEN = (PAGE, "/health", "/health_generate", "/health/live", "/health/ready", "/ready", "/ping")
ADMIN_ROUTES = {  # besides those that SGLang marks as such
    ("PUT", "/v1/annealing"),
    ("PUT", "/v1/annealing/step"),
    *((method, f"/{what}_session") for method in ("GET", "POST") for what in ("open", "close")),
}


def refused_key(
    settings: Settings, path: str, scope: Any, *, is_admin: bool
) -> RequestRefused | None:
    """Why a call may not be made with the key that it brings, or None."""
    given = bearer(scope["headers"])
    if is_key(given, settings.admin_api_key) or is_key(given, settings.warm_up_key):
        return None
    challenge = ((b"www-authenticate", b"Bearer"),)
    if is_admin:
        if settings.admin_api_key is None:
            message = (
                f"{path} changes the server, which was started without an admin key: "
                "start it with --admin-api-key-file or EAD_ADMIN_API_KEY"
            )
            return RequestRefused(message, status=403, reason="unauthorized")
        message = f"{path} needs the admin key (authorization: Bearer ...)"
        return RequestRefused(message, status=401, reason="unauthorized", headers=challenge)
    if settings.api_key is None or is_key(given, settings.api_key):
        return None
    message = "a valid API key is needed (authorization: Bearer ...)"
    return RequestRefused(message, status=401, reason="unauthorized", headers=challenge)


def sglang_admin_paths(routes: Iterable[Any]) -> Iterable[str]:
    """Paths that SGLang marks with any of its admin levels; none of them has parameters."""
    from sglang.srt.utils.auth import AuthLevel

    for route in all_routes(routes):
        level = getattr(getattr(route, "endpoint", None), "_auth_level", AuthLevel.NORMAL)
        if level != AuthLevel.NORMAL:
            yield route.path


def has_key(settings: Settings, headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether a call brings any key of this server."""
    given = bearer(headers)
    known = (settings.api_key, settings.admin_api_key, settings.warm_up_key)
    return any(is_key(given, key) for key in known)


def bearer(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The key that a call brings; empty for none. Anthropic's clients have their own header."""
    given = dict(headers)
    if b"authorization" not in given:
        return given.get(b"x-api-key", b"").decode("latin-1").strip()
    value = given[b"authorization"].decode("latin-1")
    scheme, _, key = value.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def is_key(given: str, key: str | None) -> bool:
    """Whether what is given is this key, in a time that does not tell how much of it is right."""
    return key is not None and secrets.compare_digest(given.encode(), key.encode())
