"""Addresses of servers, as people write them."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass


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


def is_this_machine(url: str) -> bool:
    """Whether the host is a name or an address of loopback, which no proxy can reach for us."""
    host = (urlsplit(url).hostname or "").rstrip(".")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None) or address
    return bool(mapped.is_loopback or mapped.is_unspecified)


def proxy_variable(url: str) -> str | None:
    """The environment variable whose proxy is asked for this address, if there is one."""
    parts = urlsplit(url)
    if is_this_machine(url) or proxy_bypass(parts.hostname or ""):
        return None
    named = next((name for name in (parts.scheme, "all") if getproxies().get(name)), None)
    return named and f"{named.upper()}_PROXY"
