"""What `ead serve` is told beyond SGLang's own flags: keys, limits, logs.

The settings travel in the environment, so that every process that answers HTTP has them
(`--tokenizer-worker-num`). A server that was not started by `ead serve` has none: SGLang's launcher
with the plugin keeps SGLang's own behaviour.
"""

from __future__ import annotations

import os
import secrets
from functools import lru_cache
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator

_VARIABLE = "EAD_SETTINGS"  # environment: Settings as JSON


class Settings(BaseModel):
    """Keys never show in a repr, a log or an answer. Limits are per request."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    api_key: str | None = Field(None, repr=False, min_length=1)  # None: no key is asked for
    admin_api_key: str | None = Field(None, repr=False, min_length=1)  # None: nobody may
    # opens everything, and only SGLang has it: for the requests that it sends itself at its start
    warm_up_key: str = Field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    # sites whose pages may call this server, as https://example.org; "*": all
    cors_origins: tuple[str, ...] = ()
    on_loopback: bool = False  # whether it listens for this machine alone
    weights_root: Path | None = None  # folder that weights are loaded from; None: from nowhere
    max_body_bytes: int = Field(32 << 20, ge=1024)
    max_answers: int = Field(4096, ge=1)  # prompts times n
    max_n: int = Field(128, ge=1)
    max_top_logprobs: int = Field(20, ge=0)
    max_stop: int = Field(16, ge=0)  # strings, and as many regexes
    drain_seconds: float = Field(30.0, ge=0)  # for answers in progress, after SIGTERM
    log_format: Literal["text", "json", "off"] = "text"

    def export(self) -> None:
        """Make these the settings of this process and of all that it starts."""
        os.environ[_VARIABLE] = self.model_dump_json()

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            parts = urlsplit(origin)
            whole = parts.scheme in ("http", "https") and parts.netloc
            if origin != "*" and not (whole and origin == f"{parts.scheme}://{parts.netloc}"):
                raise ValueError(f"must be SCHEME://HOST[:PORT] or *, got {origin!r:.100}")
        return origins


def read_key(value: str | None, file: str | Path | None) -> str | None:
    """A secret that was given itself, or in a file. Raises OSError."""
    if value or not file:
        return value or None  # an empty variable is none
    return Path(file).read_text(encoding="utf-8-sig").strip()


def current() -> Settings | None:
    """This server's settings; None when it was not started by `ead serve`."""
    return _parsed(os.environ.get(_VARIABLE))


@lru_cache(maxsize=1)
def _parsed(text: str | None) -> Settings | None:
    return None if text is None else Settings.model_validate_json(text)
