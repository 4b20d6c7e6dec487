"""Low-rank adapters of the model that is served (arXiv 2106.09685): what comes, and merging it.

A trainer that trains nothing else sends nothing else: for a matrix W [out, in] of the checkpoint
its factors W.lora_A [r, in] and W.lora_B [out, r]. The engine gets W + scale * B A, computed in
float32 from the checkpoint that the server was started with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ead_sampler.in_scheduler.bad_numbers import is_finite
from ead_server.errors import WeightsRefused
from ead_server.weights.folders import not_finite
from ead_server.weights.manifest import Manifest, Spec

_A, _B = ".lora_A", ".lora_B"
_FILE_BYTES = 256 << 20  # of what is written, and so of memory


@dataclass(frozen=True)
class AdapterManifest:
    """What an update by adapters may bring: factors of any matrices of the model, in pairs."""

    model: Manifest

    @property
    def max_bytes(self) -> int:
        """Of all factors. They are small, or whole weights would be cheaper."""
        return self.model.max_bytes

    def check(self, found: Iterable[tuple[str, Spec]]) -> set[str]:
        """Their names. Raises WeightsRefused for one that does not fit, or is there twice."""
        seen: set[str] = set()
        for name, spec in found:
            matrix, factor = name[: -len(_A)], name[-len(_A) :]
            want = self.model.specs.get(matrix)
            if factor not in (_A, _B):
                message = f"adapters are NAME{_A} and NAME{_B}, got {name!r:.200}"
            elif matrix not in self.model.required or want is None or len(want.shape) != 2:
                message = f"the model has no matrix {matrix!r:.200}"
            elif name in seen:
                message = f"{name} came twice"
            elif "float" not in spec.dtype:
                message = f"{name}: dtype must be a float, got {spec.dtype}"
            elif len(spec.shape) != 2 or (
                spec.shape[1] != want.shape[1] if factor == _A else spec.shape[0] != want.shape[0]
            ):
                shape = f"(r, {want.shape[1]})" if factor == _A else f"({want.shape[0]}, r)"
                message = f"{name}: shape must be {shape}, got {spec.shape}"
            else:
                seen.add(name)
                continue
            raise WeightsRefused(message, field=name[:200])
        return seen

    def check_whole(self, found: Iterable[tuple[str, Spec]]) -> None:
        """As `check`, and also for a factor without its other."""
        shapes = {name: spec.shape for name, spec in found}
        self.check(found)
        if not shapes:
            raise WeightsRefused("no adapters came")
        for matrix in matrices(shapes):
            a, b = shapes.get(matrix + _A), shapes.get(matrix + _B)
            if a is None or b is None:
                missing = matrix + (_A if a is None else _B)
                raise WeightsRefused(f"1 missing: {missing}", field=missing)
            if a[0] != b[1]:
                message = f"{matrix}{_B}: shape must be ({b[0]}, {a[0]}), got {b}"
                raise WeightsRefused(message, field=matrix + _B)


def matrices(names: Iterable[str]) -> frozenset[str]:
    """The matrices that adapters with these names are of."""
    return frozenset(name[: -len(_A)] for name in names)


def merge(
    adapters: Sequence[Path],
    checkpoint: Sequence[Path],
    manifest: Manifest,
    *,
    scale: float,
    whole: bool,
    out: Path,
) -> None:
    """Write the checkpoint's adapted matrices with their adapters in them to files in `out`.

    whole: and all other tensors as they are. Every one gets the dtype that is served. The files of
    adapters have passed AdapterManifest.check_whole and check_numbers. Raises WeightsRefused for a
    matrix that is not finite with its adapter.
    """
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, "pt")) for file in adapters]
        factors = {name: file for file in opened for name in file.keys()}  # noqa: SIM118

        def merged() -> Iterator[tuple[str, Tensor]]:
            for path in checkpoint:
                with safe_open(path, "pt") as file:
                    for name in file.keys():  # noqa: SIM118  (it is no mapping)
                        if name + _A in factors:
                            a, b = (factors[name + end].get_tensor(name + end) for end in (_A, _B))
                            tensor = file.get_tensor(name).float()
                            tensor.addmm_(b.float(), a.float(), alpha=scale)
                        elif whole:
                            tensor = file.get_tensor(name)
                        else:
                            continue
                        dtype = getattr(torch, manifest.specs[name].dtype)
                        if name + _A in factors and not is_finite(tensor, dtype):
                            raise not_finite(f"{name} with its adapter", dtype)
                        yield name, tensor.to(dtype)

        bucket: dict[str, Tensor] = {}
        for name, tensor in merged():
            if sum(t.nbytes for t in bucket.values()) + tensor.nbytes > _FILE_BYTES and bucket:
                _write(bucket, out)
                bucket = {}
            bucket[name] = tensor
        _write(bucket, out)


def _write(bucket: dict[str, Tensor], out: Path) -> None:
    number = len(list(out.iterdir()))
    save_file(bucket, out / f"merged-{number:05d}.safetensors")
