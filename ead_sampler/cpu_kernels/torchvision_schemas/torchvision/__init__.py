"""Declares two operators, then becomes the real `torchvision`, whose compiled part cannot load.

PyPI's torchvision is built for CUDA. Beside a CPU build of torch its `_C` library is missing
symbols, and `import torchvision` stops at "operator torchvision::nms does not exist". With the
schemas of `nms` and `qnms` declared, its Python part imports; text models need no more, and a call
of `nms` itself still fails with torch's own message.

Why a package that is found first, and not a line in some module of ours: transformers imports
torchvision inside `import sglang`, and a spawned child of SGLang begins with `import sglang`. So
in every process torchvision comes before `sgl_kernel` and before SGLang's plugins are loaded.
`sys.path` and PYTHONPATH are what a child surely takes over from its parent, and unlike a `.pth`
file or `sitecustomize` this touches no program that does not import torchvision.
"""

import importlib.machinery
import importlib.util
import os
import sys

import torch

_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

_schemas = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, _name):
        _schemas.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

_elsewhere = [entry for entry in sys.path if os.path.abspath(entry or ".") != _FOLDER]
_spec = importlib.machinery.PathFinder.find_spec(__name__, _elsewhere)
if _spec is None or _spec.loader is None:
    raise ModuleNotFoundError("No module named 'torchvision'", name=__name__)

_real = importlib.util.module_from_spec(_spec)
# The declaration lasts as long as the library object does.
_real._ead_schemas = _schemas  # type: ignore[attr-defined]
# `import` hands out whatever is in sys.modules under this name once this file has run.
sys.modules[__name__] = _real
_spec.loader.exec_module(_real)
