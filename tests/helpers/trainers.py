"""Functions of verl and TRL, to compare ours with on the same tensors.

Neither package installs beside SGLang's pins, and importing either wants ray, tensordict, datasets
and more. So `make venv` downloads their wheels next to the environment's packages, and a function
is compiled from its source there, with torch and what a test hands in as its only globals.
"""

from __future__ import annotations
import __future__

import ast
import functools
import math
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

WHEELS = Path(sys.prefix) / "wheels"


def functions(package: str, module: str, *names: str, **globals_: Any) -> SimpleNamespace:
    """Functions, methods (as functions of self) and constants `names` of a module's source.

    Their decorators and annotations are left out. Skips the test where the wheel is absent.
    """
    namespace: dict[str, Any] = {"torch": torch, "math": math, **globals_}
    for node in ast.walk(_source(package, module)):
        if isinstance(node, ast.FunctionDef) and node.name in names:
            node.decorator_list = []
        elif not (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in names):
            continue
        tree = ast.fix_missing_locations(ast.Module([node], type_ignores=[]))
        lazily = __future__.annotations.compiler_flag
        exec(compile(tree, f"{package}/{module}", "exec", flags=lazily), namespace)
    return SimpleNamespace(**{name: namespace[name] for name in names})


def branch(package: str, module: str, condition: str, assigns: str, **globals_: Any) -> Any:
    """What the body of `if condition:`, wherever a module has it, assigns to a name.

    For code that is no function of its own. The first such branch that assigns the name.
    """
    for node in ast.walk(_source(package, module)):
        if isinstance(node, ast.If) and ast.unparse(node.test) == condition:
            tree = ast.fix_missing_locations(ast.Module(node.body, type_ignores=[]))
            if any(
                isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == assigns
                for n in ast.walk(tree)
            ):
                namespace = {"torch": torch, "math": math, **globals_}
                exec(compile(tree, f"{package}/{module}", "exec"), namespace)
                return namespace[assigns]
    raise LookupError(f"{module} of {package} has no `if {condition}` that assigns {assigns}")


@functools.cache
def _source(package: str, module: str) -> ast.Module:
    wheels = list(WHEELS.glob(f"{package}-*.whl"))
    if not wheels:
        pytest.skip(f"no wheel of {package} in {WHEELS}: `make venv` downloads it")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return ast.parse(wheel.read(module))


def padded(values: Tensor, sequence_ids: Tensor) -> Tensor:
    """Packed [N], answer after answer -> [A, T], with zeros after the end of shorter answers."""
    lengths = torch.bincount(sequence_ids).tolist()
    return torch.nn.utils.rnn.pad_sequence(values.split(lengths), batch_first=True)
