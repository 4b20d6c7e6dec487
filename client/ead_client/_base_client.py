"""What both clients share: what is sent, and what is sent again. No input or output."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from ead_client._address import address_of, is_this_machine
from ead_client._clock import BaseClock
from ead_client._fields import check_keywords, record, schedule_object
from ead_client._servers import LIMITS
from ead_client._types import AnnealingDict, Json, NotGiven
from ead_client.errors import ApiError, ConnectionFailed, EadError, TimedOut

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]
# Of a rollout request: texts, token ids, messages, or objects with metadata, prefix and own n.
Prompts = Sequence[str | Sequence[int] | Messages | Mapping[str, Any]]
# A text: a preset's name or a kind's, or JSON. None: none, even where the server has a default
# schedule. Left out: as the server does by default
Annealing = AnnealingDict | Mapping[str, Any] | str | None

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
JSON_HEADERS = {"content-type": "application/json"}
DEFAULT_TIMEOUT = httpx.Timeout(600.0, connect=5.0)  # seconds; a long answer takes minutes
_NOT_BEGUN = frozenset({429, 503})  # a server that answers so has not started
_REPEATED = _NOT_BEGUN | {502, 504}  # a proxy that answers so cannot tell
_UNSENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


class BaseClient:
    """Addresses, keys and options of a client; bodies, headers and retries of its calls."""

    def __init__(
        self,
        base_url: str | Sequence[str],
        *,
        api_key: str | None,
        timeout: httpx.Timeout | float,
        deadline: float | None,
        retries: int,
        model: str,
        admin_api_key: str | None,
        compress: bool,
    ) -> None:
        urls = [base_url] if isinstance(base_url, str) else list(base_url)
        if not urls:
            raise ValueError("base_url: needs one server at least")
        self.base_urls = [address_of(url) for url in urls]
        self.base_url = self.base_urls[0]
        self.model = model
        self._retries = retries
        self._timeout = timeout if isinstance(timeout, httpx.Timeout) else httpx.Timeout(timeout)
        if deadline is not None and math.isnan(deadline):
            raise ValueError("deadline: must be a number of seconds, got nan")
        self._deadline = deadline
        # httpx would ask for compressed answers by itself
        headers = {"accept-encoding": "gzip" if compress else "identity", **_bearer(api_key)}
        self._admin_headers = _bearer(admin_api_key)
        several = len(urls) > 1  # whose transport puts the address in
        url = "http://servers" if several else self.base_url
        # proxies cannot reach this machine for us
        direct = {f"all://{httpx.URL(url).host}": None} if is_this_machine(url) else None
        self._options: Json = {
            "base_url": url,
            "timeout": self._timeout,
            "headers": headers,
            "limits": LIMITS,
            "mounts": direct,
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.base_urls))})"  # never the key

    # --- what is sent -----------------------------------------------------------------------------

    def _headers(self, headers: Mapping[str, str] | None, *, admin: bool) -> dict[str, str]:
        if admin and len(self.base_urls) > 1:
            raise ValueError("admin: what changes a server goes to a Client of that server alone")
        return {**(headers or {}), **(self._admin_headers if admin else {})}

    def _completion_body(
        self, annealing: Annealing | NotGiven, rollout: bool | Mapping[str, bool], fields: Json
    ) -> Json:
        check_keywords(fields)
        return {"model": self.model, **fields, **_our_fields(annealing, rollout)}

    def _chat_body(
        self,
        messages: Messages,
        annealing: Annealing | NotGiven,
        rollout: bool | Mapping[str, bool],
        fields: Json,
    ) -> Json:
        """Our fields go into `chat_template_kwargs`, which SGLang's router passes on."""
        check_keywords(fields)
        body = {"model": self.model, "messages": list(messages), **fields}
        ours = _our_fields(annealing, rollout)
        if ours:
            body["chat_template_kwargs"] = {**(body.get("chat_template_kwargs") or {}), **ours}
        return body

    def _rollouts_call(
        self,
        prompts: Prompts,
        sampling_params: Json,
        annealing: Annealing | NotGiven,
        accept: str,
        idempotency_key: str | None,
        **fields: Any,
    ) -> tuple[Json, dict[str, str]]:
        """Body and headers; `fields` are the request's own (n, entropies, texts)."""
        check_keywords(sampling_params)
        alone = isinstance(prompts, str | Mapping)  # one prompt, and not its letters or keys
        body: Json = {"prompts": [prompts] if alone else prompts, **fields}
        body |= _our_fields(annealing, False)
        headers = {"accept": accept}
        if idempotency_key:
            headers["idempotency-key"] = idempotency_key
        return {**body, "sampling_params": sampling_params}, headers

    # --- what is sent again -----------------------------------------------------------------------

    def _wait_before(self, attempt: int, clock: BaseClock) -> float:
        """Seconds before try number `attempt` (1 = the first retry): doubling, with jitter."""
        wait = min(0.25 * 2**attempt, 8.0) * random.uniform(0.5, 1.0)
        return min(wait, clock.left() or wait)

    def _check_retry(
        self, error: EadError, attempt: int, clock: BaseClock, *, repeatable: bool, once: bool
    ) -> None:
        """Raise unless sending again is safe: a call that changes nothing or has an idempotency
        key, one that never arrived (a refused connection), or one that the server refused to start.

        once: what was sent of the body is gone.
        """
        if clock.has_raised(error):
            raise error
        if isinstance(error, ApiError):
            again = error.status in (_REPEATED if repeatable else _NOT_BEGUN)
        else:
            unsent = isinstance(error.__cause__, _UNSENT)
            again = unsent or (repeatable and isinstance(error, ConnectionFailed | TimedOut))
        if clock.is_over and (again or isinstance(error, ConnectionFailed | TimedOut)):
            raise clock.expired(after=error)
        if once or not again or attempt >= self._retries:
            raise error
        clock.last = error


def is_repeatable(method: str, headers: Mapping[str, str]) -> bool:
    """Whether doing it twice is harmless: it only reads, or carries an idempotency key."""
    keyed = any(name.lower() == "idempotency-key" for name in headers)
    return keyed or method.upper() in ("GET", "HEAD")


def _our_fields(annealing: Annealing | NotGiven, rollout: bool | Mapping[str, bool]) -> Json:
    """Those of a request that OpenAI's API has not, where they are given."""
    fields: Json = {}
    if not isinstance(annealing, NotGiven):
        fields["annealing"] = schedule_object(annealing)
    if rollout:
        fields["rollout"] = record(rollout)
    return fields


def _bearer(key: str | None) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key else {}
