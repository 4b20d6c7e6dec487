"""The prompts of `ead rollout`, line by line.

A .jsonl file holds JSON as /v1/rollouts takes it, where fields that it does not know become
metadata; any other file holds texts. Lines end at newlines and at nothing else.
"""

from __future__ import annotations

import codecs
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ead_client import EadError, NotSendable
from ead_client._json import to_json

_FIELDS = {"text", "messages", "token_ids", "prefix_token_ids", "n", "metadata"}


@dataclass(frozen=True)
class Prompt:
    """One line of a file."""

    place: str  # FILE:LINE
    sent: dict[str, Any]  # as /v1/rollouts takes it
    size: int = 0  # bytes of JSON
    problem: str | None = None  # why it cannot be sent


def read_prompts(path: Path) -> list[Prompt]:
    """One for each line that is not blank. Raises EadError that names the line."""
    try:
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise EadError(f"cannot read {path}: {error.strerror}") from None
    prompts = []
    for number, line in enumerate(data.split(b"\n"), 1):
        place = f"{path}:{number}"
        try:
            text = line.removesuffix(b"\r").decode()
            if text.strip():
                is_json = path.suffix.lower() == ".jsonl"
                prompts.append(_checked(place, _prompt(json.loads(text) if is_json else text)))
        except (ValueError, RecursionError) as error:
            raise EadError(f"{place}: {error}") from None
    return prompts


def _checked(place: str, sent: dict[str, Any]) -> Prompt:
    try:
        return Prompt(place, sent, size=len(to_json(sent, "prompt")))
    except NotSendable as error:
        return Prompt(place, sent, problem=str(error))


def _prompt(raw: Any) -> dict[str, Any]:
    """A prompt as /v1/rollouts takes it. Raises ValueError."""
    if isinstance(raw, str):
        return {"text": raw}
    if isinstance(raw, list):
        return {"messages" if raw and isinstance(raw[0], dict) else "token_ids": raw}
    if not isinstance(raw, dict):
        raise ValueError(f"must be a text, a list or an object, got {raw!r:.100}")
    if "prompt" in raw and not _FIELDS & {*raw} - {"n", "metadata"}:
        raw = {**_prompt(raw["prompt"]), **{k: v for k, v in raw.items() if k != "prompt"}}
    unknown = {name: value for name, value in raw.items() if name not in _FIELDS}
    known = {name: value for name, value in raw.items() if name in _FIELDS}
    if unknown:
        given = known.get("metadata")
        if given is not None and not isinstance(given, dict):
            given = {"metadata": given}
        known["metadata"] = {**unknown, **(given or {})}
    return known
