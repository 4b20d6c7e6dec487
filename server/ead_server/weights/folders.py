"""A folder of weights that somebody named, looked at before anything opens what is in it.

Everything that loads weights from a folder goes through `open_folder` and `check_numbers`. Both
read files, so they are called in threads.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ead_sampler.in_scheduler.bad_numbers import is_finite
from ead_server.errors import WeightsRefused
from ead_server.weights.manifest import Spec, files_of, tensors_in

_INDEX = "model.safetensors.index.json"
_OPENED = (".safetensors", ".json")  # suffixes of what is opened in such a folder
_PIECE = 8 << 20  # bytes of a file that are in memory at a time


@dataclass(frozen=True)
class WeightFolder:
    """A folder whose files may be opened, as it was when it was looked at."""

    path: Path  # without links
    files: tuple[Path, ...]  # safetensors, those that SGLang loads
    seen: frozenset[tuple[str, int, int, int, int]]  # see _seen

    @property
    def unchanged(self) -> bool:
        """Whether all files are still those that were looked at, by what the system knows of them:
        a writer that sets the time back after it is not found out."""
        try:
            return _seen(self.path) == self.seen
        except OSError:
            return False


def open_folder(folder: str, root: Path | None, field: str = "folder") -> WeightFolder:
    """The folder of safetensors files at `folder`: regular files only, and, if `root` is not None,
    none outside it, whatever links lead to. field: what the request calls it.

    Raises WeightsRefused: 403 for what is outside, 400 for all else.
    """

    def refused(message: str, status: int = 400) -> WeightsRefused:
        return WeightsRefused(
            f"{field}: {message}, got {folder!r:.200}", status=status, field=field
        )

    try:
        os.fsencode(folder)
        path = Path(os.path.realpath(folder))
        inside = None if root is None else Path(os.path.realpath(root))
        if inside is not None and not path.is_relative_to(inside):
            raise refused("must be in the folder given as --weights-root", 403)
        if not path.is_dir():
            raise refused("must be a folder")
        for entry in path.iterdir():
            if entry.suffix not in _OPENED:
                continue
            if inside is not None and not Path(os.path.realpath(entry)).is_relative_to(inside):
                raise refused(f"{entry.name!r:.100} is a link to outside of --weights-root", 403)
            if not stat.S_ISREG(entry.stat().st_mode):
                raise refused(f"{entry.name!r:.100} must be a regular file")
        seen = _seen(path)
    except (ValueError, OSError) as error:  # NUL, surrogates, no permission, gone meanwhile
        raise refused(f"cannot be read ({type(error).__name__})") from None
    if not any(name.endswith(".safetensors") for name, *_ in seen):
        raise refused("must hold *.safetensors files")  # SGLang would unpickle .bin files
    _check_index(path / _INDEX)
    return WeightFolder(path, tuple(files_of(str(path))), seen)


def _seen(folder: Path) -> frozenset[tuple[str, int, int, int, int]]:
    """Name, device, inode, bytes and time of change of each file that may be opened."""
    states = ((e.name, e.stat()) for e in folder.iterdir() if e.suffix in _OPENED)
    return frozenset(
        (name, s.st_dev, s.st_ino, s.st_size, max(s.st_mtime_ns, s.st_ctime_ns))
        for name, s in states
    )


def _check_index(index: Path) -> None:
    """It says which files hold the tensors; SGLang looks wherever it says."""
    if not index.exists():
        return
    try:
        names: Any = set(json.loads(index.read_bytes())["weight_map"].values())
        wrong = [name for name in names if os.path.basename(name) != name]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise WeightsRefused(f"{_INDEX} is no index of safetensors", field=_INDEX) from None
    if wrong:
        message = f"{_INDEX}: must name files beside it, got {wrong[0]!r:.200}"
        raise WeightsRefused(message, field=_INDEX)


# --- numbers -------------------------------------------------------------------------------------


def check_numbers(files: Iterable[Path], served: Mapping[str, Spec]) -> None:
    """Every number in these files is finite, also in the dtype that is served, where that is known.

    Takes memory for a piece of a tensor. Raises WeightsRefused.
    """
    for file in files:
        for name, piece in _pieces(file):
            dtype = getattr(torch, served[name].dtype) if name in served else None
            if not is_finite(piece, dtype):
                raise not_finite(name, dtype)


def not_finite(name: str, dtype: torch.dtype | None) -> WeightsRefused:
    """The refusal of a tensor with such numbers."""
    as_served = "" if dtype is None else f" as {str(dtype).removeprefix('torch.')}"
    message = f"{name}: every number must be finite{as_served}, got NaN or Inf"
    return WeightsRefused(message, field=name[:200])


def _pieces(file: Path) -> Iterator[tuple[str, Tensor]]:
    """The names and numbers of a file's tensors, flat, a few megabytes at a time.

    Read, not mapped: what is read of a mapped file counts as memory of this process. A piece is
    valid until the next.
    """
    found = list(tensors_in([file]))
    buffer = memoryview(bytearray(_PIECE))
    with file.open("rb") as data:
        data.seek(8 + int.from_bytes(data.read(8), "little"))
        for name, spec in found:
            dtype = getattr(torch, spec.dtype, None)
            if dtype is None:
                message = f"{name}: numbers of dtype {spec.dtype} cannot be checked"
                raise WeightsRefused(message, field=name[:200])
            left = math.prod(spec.shape) * dtype.itemsize
            while left:
                piece = buffer[: min(_PIECE, left)]
                if data.readinto(piece) != len(piece):
                    raise WeightsRefused(f"{file.name} became shorter while it was read")
                left -= len(piece)
                yield name, torch.frombuffer(piece, dtype=dtype)
