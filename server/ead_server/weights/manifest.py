"""Files of weights: what an update must bring, and how they come over HTTP.

An update brings every tensor of the model, with its name, shape and dtype. SGLang ignores a name
that it does not know, keeps what did not come, and dies of a wrong shape (0.5.23: its way back from
a failed load reads the same files again). So all is checked before any is loaded.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import ClientDisconnect

from ead_server.errors import WeightsRefused

STALL_SECONDS = 60.0  # without a byte, an update that is coming has failed
_LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
_PIECE = 4 << 20  # bytes of a body that are in memory at a time
_DTYPES = {  # safetensors' names of torch's
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


class Spec(BaseModel):
    """A tensor, without its numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: str = Field(description="torch's name for it")
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """The tensors of the model that is served, by their names in its checkpoint."""

    specs: Mapping[str, Spec]
    required: frozenset[str]  # the others may come, and SGLang leaves them
    max_bytes: int  # of all, in whichever dtype

    def check(self, found: Iterable[tuple[str, Spec]]) -> set[str]:
        """Their names. Raises WeightsRefused for one that is unknown, wrong, or there twice."""
        seen: set[str] = set()
        for name, spec in found:
            want = self.specs.get(name)
            if want is None:
                message = f"the model has no tensor {name!r:.200}"
            elif name in seen:
                message = f"{name} came twice"
            elif spec.shape != want.shape:
                message = _wrong("shape", name, want, spec)
            elif spec.dtype != want.dtype:
                message = _wrong("dtype", name, want, spec)
            else:
                seen.add(name)
                continue
            raise WeightsRefused(message, field=name[:200])
        return seen

    def check_whole(self, found: Iterable[tuple[str, Spec]]) -> None:
        """As `check`, and also for one that is missing."""
        missing = sorted(self.required - self.check(found))
        if missing:
            message = f"{len(missing)} missing: {', '.join(missing[:3])}"
            raise WeightsRefused(message, field=missing[0])


def _wrong(what: str, name: str, want: Spec, got: Spec) -> str:
    return f"{name}: {what} must be {getattr(want, what)}, got {getattr(got, what)}"


def manifest_of(manager: Any) -> Manifest:
    """manager: SGLang's TokenizerManager. Raises WeightsRefused where it cannot be known.

    Read from the checkpoint that the server was started with. Floats have the dtype that is served,
    but for those that the checkpoint keeps in another one than most (a router's float32 bias).
    """
    args, config = manager.server_args, manager.model_config
    if config.quantization is not None:
        raise WeightsRefused(f"the weights that are served are quantised: {config.quantization}")
    files = files_of(args.model_path, args.revision)
    found = dict(tensors_in(files))
    floats = Counter(spec.dtype for spec in found.values() if "float" in spec.dtype)
    ((most, _),) = floats.most_common(1)
    served = str(config.dtype).removeprefix("torch.")
    return Manifest(
        {
            name: spec.model_copy(update={"dtype": served}) if spec.dtype == most else spec
            for name, spec in found.items()
        },
        frozenset(name for name in found if _is_loaded(name, config.hf_text_config)),
        4 * sum(file.stat().st_size for file in files),
    )


def files_of(path: str, revision: str | None = None) -> list[Path]:
    """The files that SGLang loads for a folder or a name on a hub. Raises WeightsRefused."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader.loader import DefaultModelLoader

    loader = DefaultModelLoader(LoadConfig(load_format="safetensors"))
    try:
        _, files, _ = loader._prepare_weights(path, revision, fall_back_to_pt=False)
    except (RuntimeError, ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise WeightsRefused(f"no safetensors in {path}: {error}") from None
    return [Path(file) for file in files]


def tensors_in(files: Iterable[Path]) -> Iterator[tuple[str, Spec]]:
    """By the headers, which are checked against the files' sizes; in the order of their bytes, of
    which none is left out. Raises WeightsRefused."""
    return chain.from_iterable(map(_header, files))


def _header(file: Path) -> Iterator[tuple[str, Spec]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            for name in tensors.offset_keys():
                tensor = tensors.get_slice(name)
                dtype = tensor.get_dtype()
                yield name, Spec(dtype=_DTYPES.get(dtype, dtype), shape=tensor.get_shape())
    except SafetensorError as error:
        raise WeightsRefused(f"{file.name} is not safetensors: {error}") from None
    except OSError as error:
        raise WeightsRefused(f"{file.name} cannot be read: {error.strerror or error}") from None


def _is_loaded(name: str, config: Any) -> bool:
    """Whether SGLang's model takes this tensor out of its checkpoint. It leaves a head that is tied
    to the embedding, layers that predict the token after the next, and buffers of old."""
    if name == "lm_head.weight":
        return not getattr(config, "tie_word_embeddings", False)
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    beyond = layer is not None and int(layer[1]) >= config.num_hidden_layers
    return not (beyond or name.startswith("mtp.") or name.endswith("rotary_emb.inv_freq"))


# --- files in a request's body -----------------------------------------------------------------


class _Pieces:
    """A request's body, cut anew."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks
        self._buffer = bytearray()

    async def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer only at the end. Raises WeightsRefused."""
        while len(self._buffer) < size:
            try:
                async with asyncio.timeout(STALL_SECONDS):
                    self._buffer += await anext(self._chunks)
            except StopAsyncIteration:
                break
            except ClientDisconnect:
                raise WeightsRefused("the connection was lost") from None
            except TimeoutError:
                message = f"nothing came for {STALL_SECONDS:.0f} s"
                raise WeightsRefused(message, status=408) from None
        piece = bytes(self._buffer[:size])
        del self._buffer[:size]
        return piece


class Wanted(Protocol):
    """What files must hold: a Manifest, or an AdapterManifest."""

    @property
    def max_bytes(self) -> int: ...

    def check(self, found: Iterable[tuple[str, Spec]]) -> set[str]: ...

    def check_whole(self, found: Iterable[tuple[str, Spec]]) -> None: ...


async def receive_files(
    body: AsyncIterator[bytes],
    folder: Path,
    wanted: Wanted,
    check_numbers: Callable[[Path], None],
) -> dict[str, Spec]:
    """Write safetensors files, each after its length (uint64, little-endian), to `folder`.

    check_numbers: of one file that is there; called in a thread, raises WeightsRefused. Returns the
    tensors in them. Raises WeightsRefused unless they are all that is wanted, and OSError where
    there is no room.
    """
    pieces = _Pieces(body)
    found: list[tuple[str, Spec]] = []
    total = 0
    for number in count():
        head = await pieces.read(8)
        if not head:
            break
        left = int.from_bytes(head, "little")
        total += left
        if len(head) < 8 or left == 0 or total > wanted.max_bytes + _LARGEST_HEADER:
            raise WeightsRefused(f"not the length of a safetensors file: {head.hex()}")
        file = folder / f"bucket-{number:05d}.safetensors"
        with file.open("wb") as out:
            while left:
                piece = await pieces.read(min(left, _PIECE))
                if not piece:
                    raise WeightsRefused("the body ended in the middle of a file")
                await asyncio.to_thread(out.write, piece)
                left -= len(piece)
        bucket = await asyncio.to_thread(list, tensors_in([file]))
        if not bucket:
            raise WeightsRefused("a file without tensors")
        found += bucket
        wanted.check(found)
        await asyncio.to_thread(check_numbers, file)
    wanted.check_whole(found)
    return dict(found)
