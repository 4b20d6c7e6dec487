"""What a call's headers must be, whichever route it is for.

A server on loopback without a key is open to its user's programs, and so to the browser: any page
that the user visits can send it requests. What gives a page away is its Origin, and a Host that is
not this machine's name (a page's own name that was made to mean 127.0.0.1).
"""

from __future__ import annotations

import ipaddress
from typing import Any
from urllib.parse import urlsplit

from ead_server.errors import CLOSE, RequestRefused
from ead_server.settings import Settings

MAX_HEADER_BYTES = 64 << 10  # as h11, one of uvicorn's two parsers; the other has no limit
# Of two values, readers would take different ones.
ONCE = (
    b"authorization",
    b"content-type",
    b"content-length",
    b"content-encoding",
    b"host",
    b"idempotency-key",
    b"origin",
    b"x-api-key",
)
UPLOADS = ("/v1/audio/transcriptions",)  # whose bodies are files and not JSON


def refused_headers(
    settings: Settings, path: str, scope: Any, *, has_key: bool
) -> RequestRefused | None:
    """Why a call is not taken for what its headers say, or None.

    has_key: whether it brings a key of this server, as no strange page can.
    """
    size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    size += sum(len(name) + len(value) for name, value in scope["headers"])
    if size > MAX_HEADER_BYTES:
        message = f"URL and headers must have at most {MAX_HEADER_BYTES:,} bytes"
        return RequestRefused(message, status=431, reason="too_large", headers=CLOSE)
    given: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        # the same twice does no harm: SGLang's router sends the key that it passes on once more
        if given.setdefault(name.lower(), value) != value and name.lower() in ONCE:
            field = name.decode("latin-1").lower()
            message = f"{field}: must be sent once, got two different ones"
            return RequestRefused(message, field=field)
    kind = given.get(b"content-type", b"").lower()
    if kind.startswith((b"multipart/", b"application/x-www-form")) and path not in UPLOADS:
        message = f"content-type: must be application/json, got {kind.decode('latin-1')!r:.100}"
        return RequestRefused(message, status=415, field="content-type")
    return None if has_key else _refused_page(settings, given)


def is_preflight(scope: Any) -> bool:
    """Whether a browser asks if a page may make a call. It brings no key, and makes none."""
    names = {name.lower() for name, _ in scope["headers"]}
    asks = {b"origin", b"access-control-request-method"}
    return scope["method"] == "OPTIONS" and asks <= names


def is_loopback(host: str) -> bool:
    """Whether this name or address is this machine's own, for itself alone."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _refused_page(settings: Settings, given: dict[bytes, bytes]) -> RequestRefused | None:
    """A call that a page of another site makes, without a key."""
    host = given.get(b"host", b"").decode("latin-1")
    origin = given.get(b"origin", b"").decode("latin-1")
    if "*" in settings.cors_origins:
        return None
    allowed = {urlsplit(allowed).netloc.lower() for allowed in settings.cors_origins}
    if settings.on_loopback and host and host.lower() not in allowed:
        name = urlsplit(f"//{host}").hostname or ""
        if not is_loopback(name):
            message = f"host: must be a name of this machine (--cors-origin), got {host!r:.100}"
            return RequestRefused(message, status=403, reason="unauthorized", field="host")
    if origin and origin not in settings.cors_origins and urlsplit(origin).netloc != host:
        message = f"origin: pages of {origin!r:.100} may not call this server (--cors-origin)"
        return RequestRefused(message, status=403, reason="unauthorized", field="origin")
    return None
