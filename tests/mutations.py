"""Break one line at a time, and see that tests notice: `make mutations`. See mutations.md.

    python tests/mutations.py [NUMBER ...]

Exit status 1 when a mutation survives, or its line is not there any more.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
IGNORED = (".git", ".venv", "site", "runs", "__pycache__", ".*_cache")
_ENTRY = re.compile(
    r"^## (\d+)\. (.+)\n\n`(.+?)`, caught by `(.+)`\n\n```diff\n((?:-.*\n)+)((?:\+.*\n)+)```$", re.M
)


@dataclass(frozen=True)
class Mutation:
    number: int
    what: str
    file: str
    tests: str  # arguments of pytest
    old: str
    new: str


def mutations() -> Iterator[Mutation]:
    """As mutations.md lists them."""
    for entry in _ENTRY.finditer((ROOT / "tests" / "mutations.md").read_text()):
        number, what, file, tests, old, new = entry.groups()
        old, new = (re.sub(r"^[-+]", "", lines, flags=re.M) for lines in (old, new))
        yield Mutation(int(number), what, file, tests, old, new)


def noticed(mutation: Mutation, copy: Path) -> str | None:
    """What is wrong, None when a test failed."""
    file = copy / mutation.file
    whole = file.read_text()
    if whole.count(mutation.old) != 1:
        return f"the line stands {whole.count(mutation.old)} times in {mutation.file}"
    file.write_text(whole.replace(mutation.old, mutation.new))
    try:
        path = os.pathsep.join(
            str(copy / part) for part in ("", "server", "client", "cli", "tests")
        )
        environ = {**os.environ, "PYTHONPATH": path, "CI": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        arguments = re.findall(r'"([^"]+)"|(\S+)', mutation.tests)
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        command += [quoted or plain for quoted, plain in arguments]
        ended = subprocess.run(command, cwd=copy, env=environ, capture_output=True, text=True)
    finally:
        file.write_text(whole)
    if ended.returncode == 1:
        return None
    if ended.returncode == 0:
        return "SURVIVED"
    return f"pytest ended with {ended.returncode}: {ended.stdout[-300:]}{ended.stderr[-300:]}"


def main() -> None:
    wanted = {int(number) for number in sys.argv[1:]}
    found = [m for m in mutations() if not wanted or m.number in wanted]
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*IGNORED))
        for mutation in found:
            began = time.monotonic()
            problem = noticed(mutation, copy)
            wrong += problem is not None
            seconds = time.monotonic() - began
            told = problem or f"noticed in {seconds:.0f} s"
            print(f"{mutation.number:3} {mutation.what}: {told}", flush=True)
    print(f"{len(found) - wrong} of {len(found)} noticed")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
