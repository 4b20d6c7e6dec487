"""One run owns a folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer_bridge.errors import BadConfig


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """The folder is made, and no other process may run in it meanwhile.

    The system forgets the lock with the process that holds it, however that ends. Raises BadConfig
    when another holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise BadConfig(f"{folder} is in use by a run (process {file.read()[:20]})") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
