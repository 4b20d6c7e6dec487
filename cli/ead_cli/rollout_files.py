"""Where the answers of `ead rollout` go, so that it can go on where it was stopped.

Answers go to a .jsonl file, one line per prompt as it completes, or to a folder, one safetensors
file per prompt, named by its number. What was asked, and of which model, is kept beside them, so
that answers to other questions are never mixed in, and nothing is touched that is not ours.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import orjson

from ead_cli.outputs import cannot_write
from ead_client import EadError, Group
from ead_client._json import to_json

_BEGIN = b'{"index":'  # of each line
_NAME = re.compile(r"([0-9]{6}|[1-9][0-9]{6,})\.safetensors", re.ASCII)


def answers_at(path: Path) -> Answers:
    """What takes the answers at this path. Nothing is written yet. Raises EadError."""
    path = path.absolute()
    is_file = path.suffix.lower() == ".jsonl"
    if not path.name:
        raise EadError(f"--out: must be a .jsonl file or a folder, got {path}")
    if path.exists() and (path.is_file() != is_file or path.is_dir() == is_file):
        raise EadError(f"--out: must be a .jsonl file, or else a folder, got {path}")
    answers: Answers = Lines(path) if is_file else Folder(path)
    for written in (path, answers.settings_file):
        if (reason := cannot_write(written)) is not None:
            raise EadError(f"--out: {reason}")
    return answers


class Answers:
    """What both forms share. Use as a context manager: it is one call's at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings_file = path.with_name(f"{path.name}.settings.json")
        self._settings: dict[str, Any] = {}
        self._lock: IO[bytes] | None = None

    def open(self, asked: Mapping[str, Any], prompts: int) -> set[int]:
        """Which of so many prompts are answered already. Raises EadError when what is there was
        asked otherwise, is not ours, or is being written by somebody else."""
        if self.settings_file.exists():
            before = _our_settings(self.settings_file)
            for name in asked:
                self._check(name, before.get(name), asked[name])
            self._settings = before
        else:
            if self._holds_something():
                raise EadError(f"{self.path} exists, and nothing says what was asked; choose anew")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._settings = dict(asked)
            self._save()
        self._take_lock()
        return self._done(prompts)

    def check_served(self, served: Mapping[str, Any]) -> str | None:
        """Raises EadError when the answers before are another model's; returns what is worth saying
        of other servers."""
        before = {name: self._settings.get(name) for name in served}
        for name in ("model", "weight_version"):
            if before.get(name) is not None and served.get(name) is not None:
                self._check(name, before[name], served[name])
        self._settings |= {k: v for k, v in served.items() if v is not None}
        self._save()
        self._take_lock()  # of the file that is there now
        servers: list[str] | None = before.get("servers")
        if servers is None or servers == served.get("servers"):
            return None
        return f"the answers before came from {', '.join(servers)}"

    def _check(self, name: str, before: Any, now: Any) -> None:
        if before != now:
            raise EadError(
                f"{self.path.name} has answers with another {name}: "
                f"{before!r:.100}, not {now!r:.100}"
            )

    def _save(self) -> None:
        """Whole or not at all."""
        partial = self.settings_file.with_name(f"{self.settings_file.name}.partial")
        partial.write_bytes(to_json(self._settings, "settings"))
        partial.rename(self.settings_file)

    def _take_lock(self) -> None:
        lock = self.settings_file.open("rb")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise EadError(f"another ead rollout is writing to {self.path}") from None
        self.close()
        self._lock = lock

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _holds_something(self) -> bool:
        raise NotImplementedError

    def _done(self, prompts: int) -> set[int]:
        raise NotImplementedError

    def write(self, index: int, group: Group) -> None:
        raise NotImplementedError


def _our_settings(file: Path) -> dict[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(file.read_bytes())
        if isinstance(found, dict) and "prompts_sha256" in found:
            return found
    raise EadError(f"{file} does not say what ead rollout asked; choose another --out")


class Lines(Answers):
    """A line of JSON per prompt."""

    def _holds_something(self) -> bool:
        return self.path.exists() and self.path.stat().st_size > 0

    def _done(self, prompts: int) -> set[int]:
        """Of whole lines; a last one that was cut off is dropped, once all others are known as
        ours."""
        if not self.path.exists():
            return set()
        done, end, last = set(), 0, b""
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                index = _index_of(line, prompts)
                if index is not None:
                    done.add(index)
                elif line.endswith(b"\n") or not (
                    line.startswith(_BEGIN) or _BEGIN.startswith(line)
                ):
                    raise EadError(
                        f"{self.path}:{number} is not of ead rollout; nothing is changed"
                    )
                if index is not None or line.endswith(b"\n"):
                    end, last = end + len(line), line
        if end < self.path.stat().st_size:
            with self.path.open("r+b") as file:
                file.truncate(end)
        if last and not last.endswith(b"\n"):  # all of a line but its end
            with self.path.open("ab") as file:
                file.write(b"\n")
        return done

    def write(self, index: int, group: Group) -> None:
        line = {
            "index": index,
            "metadata": group.metadata,
            "prompt_token_ids": group.prompt_token_ids,
            "answers": [
                a.model_dump(exclude={"tokens", "error", "reasoning"}) for a in group.answers
            ],
        }
        with self.path.open("ab") as file:
            file.write(orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n")


def _index_of(line: bytes, prompts: int) -> int | None:
    """Of a line of ours."""
    with contextlib.suppress(ValueError, RecursionError):
        entry = orjson.loads(line)
        if isinstance(entry, dict) and isinstance(entry.get("answers"), list):
            index = entry.get("index")
            if type(index) is int and 0 <= index < prompts:
                return index
    return None


class Folder(Answers):
    """A safetensors file per prompt, as the server sent it."""

    def _holds_something(self) -> bool:
        return self.path.exists() and any(self.path.iterdir())

    def _done(self, prompts: int) -> set[int]:
        """Files with other names are somebody else's, and stay."""
        if not self.path.exists():
            return set()
        done = set()
        for file in self.path.iterdir():
            named = _NAME.fullmatch(file.name)
            if named is None:
                continue
            index = int(named[1])
            if index >= prompts or not _is_ours(file):
                raise EadError(f"{file} is not of this ead rollout; nothing is changed")
            done.add(index)
        return done

    def write(self, index: int, group: Group) -> None:
        self.path.mkdir(exist_ok=True)
        partial = self.path / f"{index:06d}.partial"
        assert group.packed is not None
        partial.write_bytes(group.packed)
        partial.rename(self.path / f"{index:06d}.safetensors")


def _is_ours(file: Path) -> bool:
    """Whether it is a whole file with what is said of a group; its numbers are not read."""
    with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError), file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        size = file.stat().st_size
        if length > size:
            return False
        arrays = json.loads(f.read(length))
        arrays.pop("__metadata__", None)
        end = max(array["data_offsets"][1] for array in arrays.values())
        return {"json", "offsets", "prompt_offsets"} <= {*arrays} and 8 + length + end == size
    return False
