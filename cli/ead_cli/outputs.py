"""Whether an output can be written, found before the work whose result it takes."""

from __future__ import annotations

import os
from pathlib import Path


def cannot_write(path: Path) -> str | None:
    """Why a file or folder could not be made or written at this path; None: it could.

    Folders that are missing on the way are no reason: they can be made.
    """
    there = os.path.abspath(path)
    while not os.path.lexists(there):  # the nearest part of it that exists
        there = os.path.dirname(there)
    if there != os.path.abspath(path) and not os.path.isdir(there):
        return f"cannot write {path}: {there} is not a folder"
    needed = os.W_OK | os.X_OK if os.path.isdir(there) else os.W_OK
    if not os.access(there, needed):
        return f"cannot write {path}: no permission to write to {there}"
    return None


def check_folder(path: Path, flag: str) -> None:
    """Raises SystemExit for a folder that could not be made or written to."""
    reason = cannot_write(path)
    if reason is None and path.exists() and not path.is_dir():
        reason = f"cannot write to {path}: it is a file, and a folder is needed"
    if reason is not None:
        raise SystemExit(f"ead: {flag}: {reason}")


def check_file(path: Path, flag: str) -> None:
    """Raises SystemExit for a file that could not be made or written."""
    reason = cannot_write(path)
    if reason is None and path.is_dir():
        reason = f"cannot write {path}: it is a folder, and a file is needed"
    if reason is not None:
        raise SystemExit(f"ead: {flag}: {reason}")
