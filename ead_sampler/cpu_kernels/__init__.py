"""Lets SGLang run on a CPU for which no compiled `sgl_kernel` exists.

This folder holds `sgl_kernel`, the few functions that SGLang's CPU mode needs, in plain torch. It
is found only where `use_torch_kernels` has put the folder on `sys.path`:

    if not compiled_kernels_available():
        use_torch_kernels()

Both must run before `sglang` is first imported, and before SGLang starts its children: a spawned
child imports `sglang`, and with it torchvision and `sgl_kernel`, before any plugin is loaded. It
takes over its parent's `sys.path` and environment.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import sys
from pathlib import Path

_KERNELS = Path(__file__).resolve().parent
_TORCHVISION = _KERNELS / "torchvision_schemas"


def compiled_kernels_available() -> bool:
    """Whether a compiled `sgl_kernel` imports here; our own in its place does not count.

    One that fails to import leaves nothing in `sys.modules`; one that imports stays.
    """
    loaded = sys.modules.get("sgl_kernel")
    if loaded is not None:
        return not _is_ours(loaded.__file__)
    search_path = sys.path.copy()
    sys.path[:] = _without_ours(search_path)
    try:
        importlib.import_module("sgl_kernel")
    except Exception:  # the CUDA build raises ImportError, OSError or RuntimeError without libcuda
        for name in [n for n in sys.modules if n.split(".")[0] == "sgl_kernel"]:
            del sys.modules[name]
        return False
    finally:
        sys.path[:] = search_path
    return True


def use_torch_kernels() -> None:
    """Make `import sgl_kernel` find the plain-torch one, here and in every child process.

    Also makes PyPI's torchvision importable beside a CPU build of torch, where it is installed and
    needs that: see `torchvision_schemas/torchvision/__init__.py`. Calling it again changes nothing.
    """
    ours = [str(_KERNELS)]
    if _torchvision_lacks_operators():
        ours.append(str(_TORCHVISION))
    sys.path[:] = ours + _without_ours(sys.path)
    inherited = os.environ.get("PYTHONPATH", "")
    entries = _without_ours(inherited.split(os.pathsep)) if inherited else []
    os.environ["PYTHONPATH"] = os.pathsep.join(ours + entries)
    importlib.invalidate_caches()


def _torchvision_lacks_operators() -> bool:
    """Whether torchvision is installed and its compiled part cannot be loaded."""
    spec = importlib.machinery.PathFinder.find_spec("torchvision", _without_ours(sys.path))
    if spec is None or spec.origin is None:
        return False
    # Imported here: a caller that only asks whether compiled kernels exist need not wait for it.
    import torch

    try:
        torch.ops.load_library(str(Path(spec.origin).with_name("_C.so")))
    except OSError:
        return True
    return False


def _without_ours(entries: list[str]) -> list[str]:
    """A search path without the folders that `use_torch_kernels` adds."""
    return [e for e in entries if Path(e or ".").resolve() not in (_KERNELS, _TORCHVISION)]


def _is_ours(file: str | None) -> bool:
    return file is not None and Path(file).resolve().is_relative_to(_KERNELS)
