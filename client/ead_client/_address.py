"""Addresses of servers, as people write them."""

from __future__ import annotations

from urllib.parse import urlsplit


def address_of(written: str) -> str:
    """The address that paths are put behind: with a scheme, and without the /v1 that other
    clients want at its end. Raises ValueError for what is no address of an HTTP server."""
    url = written.strip()
    if "://" not in url:
        url = f"http://{url}"
    parts = urlsplit(url)
    try:
        known = parts.scheme.lower() in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number, or too large
        known = False
    if not known or parts.query or parts.fragment:
        raise ValueError(f"base_url: must be http[s]://HOST[:PORT][/PREFIX], got {written!r}")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")
