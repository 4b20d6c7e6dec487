"""Write the synchronous client, `_sync`, from the asynchronous one, `_async`.

python scripts/unasync.py           write what has changed (`make format` does)
python scripts/unasync.py --check   write nothing; fail if something has changed (`make check` does)

Only words are replaced. What differs by more, as waiting does, has two forms with the same methods
in a module that both import: `AsyncClock` and `Clock`. Docstrings are for readers of either client:
"Asynchronous" and `async with` become what they must.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CLIENT = ROOT / "client" / "ead_client"
MARK = "# Generated from {} by `python scripts/unasync.py`: edit that file instead.\n"
WORDS = [  # in this order
    (r"\basync (?=def|for|with)", ""),
    (r"\bawait ", ""),
    (r"\b_async\b", "_sync"),
    (r"\basynccontextmanager\b", "contextmanager"),
    (r"\bAsynchronous\b", "Synchronous"),
    (r"\bAsyncByteStream\b", "SyncByteStream"),
    (r"\b(_?)Async(?=[A-Z])", r"\1"),
    (r"\bhandle_async_request\b", "handle_request"),
    (r"\b__a(?=(enter|exit|iter)__)", "__"),
    (r"\ba(?=(close|read|iter_bytes)\b)", ""),
]
LEFT = re.compile(r".*(async|await).*", re.IGNORECASE)
# of ruff: the order of imports, `yield from` where no `async for` forbids it, lengths of lines
TIDY = [["check", "--select=I,UP028", "--fix", "--unsafe-fixes"], ["format"]]
RUFF_OPTIONS = [
    f"--config={ROOT}/pyproject.toml",
    "--config=lint.isort.known-first-party=['ead_client']",  # also where nothing is written yet
    "--quiet",
]


def synchronous(source: Path, target: Path) -> str:
    """What `target` must be. Exits at a line that no rule makes synchronous."""
    text = source.read_text()
    for pattern, word in WORDS:
        text = re.sub(pattern, word, text)
    if left := LEFT.search(text):
        sys.exit(f"{source}: no rule makes this synchronous: {left.group().strip()}")
    for arguments in TIDY:
        ruff = [sys.executable, "-m", "ruff", *arguments, *RUFF_OPTIONS]
        command = [*ruff, f"--stdin-filename={target}", "-"]
        text = subprocess.run(command, input=text, text=True, stdout=-1, check=True).stdout
    return MARK.format(f"{source.parent.name}/{source.name}") + text


def main(*, check: bool, client: Path = CLIENT) -> int:
    """The exit status: 1 if `check` and a file of `_sync` is not what its source makes."""
    folder = client / "_sync"
    wanted = {
        folder / source.name: synchronous(source, folder / source.name)
        for source in (client / "_async").glob("*.py")
    }
    found = {path: path.read_text() for path in folder.glob("*.py")}
    changed = sorted(p for p in wanted.keys() | found.keys() if wanted.get(p) != found.get(p))
    for path in changed:
        print(f"{path}: is not what _async makes; run: make format" if check else f"wrote {path}")
        if check:
            continue
        if path in wanted:
            path.write_text(wanted[path])
        else:
            path.unlink()
    return 1 if check and changed else 0


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
