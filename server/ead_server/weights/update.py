"""New weights into the engine while it serves, whole or not at all.

However they come, it is one transaction: check everything (names, shapes and dtypes by
`manifest`, every number by `folders`); pause; flush the cache; load; set the version;
continue. What goes wrong before the load leaves the old weights
serving. What goes wrong in it leaves the engine paused, and `Weights.broken` says why, until a
whole update has come: half-new weights are never sampled from.

Tensors over HTTP wait in files until the last of them is there. A trainer that dies while it sends
leaves no trace, and generation pauses for a load from disk only. A broadcast goes straight into the
engine, which is paused meanwhile, so a trainer that dies in it leaves it paused; its numbers are
checked bucket by bucket, each before it is loaded (`ead_sampler.in_scheduler.bad_numbers`).
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from ead_sampler.defaults import shared_defaults
from ead_server import settings
from ead_server.errors import NothingLoaded, WeightsRefused
from ead_server.weights.adapters import AdapterManifest, matrices, merge
from ead_server.weights.broadcast import BroadcastReceiver, Bucket, ProcessGroup
from ead_server.weights.folders import WeightFolder, check_numbers, open_folder
from ead_server.weights.manifest import (
    Manifest,
    files_of,
    manifest_of,
    receive_files,
    tensors_in,
)

# What becomes of answers in progress. retract: they go on from their tokens, whose keys and values
# the new weights compute anew, so that each token is from one version and its log-probabilities are
# that version's. abort: they end where they are. in_place: they go on with the old keys and values,
# as do new prompts that begin like an old one, and their log-probabilities are no version's.
Pause = Literal["retract", "abort", "in_place"]
Seconds = dict[str, float]  # by phase

BUSY_SECONDS = 30.0  # for requests that keep the cache from being flushed


def spool_prefix(process_id: int) -> str:
    """Of the folder for temporary files in which a server keeps the tensors that are coming."""
    return f"ead-weights-{process_id}-"


class Weights:
    """The way to a server's weights. manager: SGLang's TokenizerManager, the only one it has.

    updating: the version that is coming. broken: why what is loaded is no version, if it is none.
    """

    def __init__(self, manager: Any) -> None:
        self.manager = manager
        self.updating: str | None = None
        self.broken: str | None = None
        self.broadcast = BroadcastReceiver(manager)
        # the count of updates at which the engine had the checkpoint but for these matrices
        self._adapted: tuple[int, frozenset[str]] = (0, frozenset())

    @property
    def version(self) -> str:
        """What is served, or was before it broke."""
        return str(self.manager.config_value("weight_version"))

    @cached_property
    def manifest(self) -> Manifest:
        """What a version must bring. Raises WeightsRefused where that cannot be known."""
        return manifest_of(self.manager)

    async def _manifest(self) -> Manifest:
        """As `manifest`, which reads files when it is first asked for."""
        return await asyncio.to_thread(lambda: self.manifest)

    @property
    def standstill(self) -> str | None:
        """Why nothing is generated now; None: it is."""
        if self.broken is not None:
            return f"the weights are incomplete, waiting for a whole update: {self.broken}"
        if not self.manager.is_pause:
            return None
        return "paused" if self.updating is None else f"updating to version {self.updating}"

    # --- the ways, each of which returns seconds and raises WeightsRefused ------------------

    async def from_tensors(self, body: AsyncIterator[bytes], version: str, pause: Pause) -> Seconds:
        """body: safetensors files, each after its length (uint64, little-endian).

        Takes a few MiB of memory, and room for the weights in the folder for temporary files.
        """
        with self._claimed(version), _spool() as folder:
            started = time.perf_counter()
            manifest = await self._manifest()
            await receive_files(
                body, folder, manifest, lambda file: check_numbers([file], manifest.specs)
            )
            transfer = time.perf_counter() - started
            load = partial(self._load_folder, str(folder))
            return {"transfer": transfer, **await self._replace(version, pause, load)}

    async def from_adapters(
        self, body: AsyncIterator[bytes], scale: float, version: str, pause: Pause
    ) -> Seconds:
        """body: as above, of low-rank factors; see `adapters`. Other matrices are the checkpoint's.

        Those that changed are loaded; all where it is not known what was loaded before.
        """
        with self._claimed(version), _spool() as folder:
            started = time.perf_counter()
            came, merged = folder / "came", folder / "merged"
            came.mkdir()
            merged.mkdir()
            manifest = await self._manifest()
            factors = await receive_files(
                body, came, AdapterManifest(manifest), lambda file: check_numbers([file], {})
            )
            adapted = matrices(factors)
            transfer = time.perf_counter() - started
            updates, before = self._adapted
            args = self.manager.server_args
            known = self.broken is None and updates == shared_defaults().weight_updates
            await asyncio.to_thread(
                merge,
                sorted(came.iterdir()),
                await asyncio.to_thread(files_of, args.model_path, args.revision),
                manifest,
                scale=scale,
                whole=not (known and before <= adapted),
                out=merged,
            )
            merging = time.perf_counter() - started - transfer
            seconds = await self._replace(version, pause, partial(self._load_folder, str(merged)))
            self._adapted = shared_defaults().weight_updates, adapted
            return {"transfer": transfer, "merge": merging, **seconds}

    async def from_disk(
        self,
        folder: str,
        version: str,
        pause: Pause,
        field: str = "folder",
        *,
        recapture: bool = False,
    ) -> Seconds:
        """folder: of safetensors files, below --weights-root. field: what the request calls it.

        recapture: SGLang's CUDA graphs, after the load.
        """
        with self._claimed(version):
            checked = await asyncio.to_thread(self.checked_folder, folder, field)
            load = partial(self._load_checked, checked, recapture=recapture)
            return await self._replace(version, pause, load)

    def checked_folder(self, folder: str, field: str) -> WeightFolder:
        """A folder that holds a version; to be called in a thread. Raises WeightsRefused."""
        current = settings.current()
        root = None if current is None else current.weights_root
        checked = open_folder(folder, root, field)
        try:
            manifest = self.manifest
        except WeightsRefused:
            if field == "folder":
                raise
            # SGLang's route also loads quantised models, of which only the numbers can be checked
            check_numbers(checked.files, {})
        else:
            manifest.check_whole(tensors_in(checked.files))
            check_numbers(checked.files, manifest.specs)
        return checked

    async def from_broadcast(
        self,
        buckets: Sequence[Bucket],
        group: ProcessGroup,
        version: str,
        pause: Pause,
        say: Callable[[str], None],
    ) -> Seconds:
        """Each bucket is one broadcast by the trainer: its tensors' bytes, end to end.

        say: called with "join" when the trainer is to make its side of a new group, and with
        "receive" when it is to begin.
        """
        with self._claimed(version):
            manifest = await self._manifest()
            manifest.check_whole(chain.from_iterable(buckets))
            if self.manager.server_args.dp_size > 1:
                raise WeightsRefused("SGLang has no broadcast to data-parallel replicas")
            started = time.perf_counter()
            if group != self.broadcast.group:
                await self.broadcast.join(group, say)
            join = time.perf_counter() - started
            load = partial(self.broadcast.load, buckets, say)
            try:
                return {"join": join, **await self._replace(version, pause, load)}
            except BaseException:
                await self.broadcast.leave()  # which ends the trainer's broadcast
                raise

    # --- the transaction --------------------------------------------------------------------------

    @contextmanager
    def _claimed(self, version: str) -> Iterator[None]:
        if self.updating is not None:
            message = f"an update to version {self.updating} is in progress"
            raise WeightsRefused(message, status=409)
        self.updating = version
        try:
            yield
        finally:
            self.updating = None

    async def _replace(
        self, version: str, pause: Pause, load: Callable[[], Awaitable[None]]
    ) -> Seconds:
        from sglang.srt.managers.io_struct import UpdateWeightVersionReqInput

        started = time.perf_counter()
        paused_by_user = self.manager.is_pause and self.broken is None
        await self._stand_still(pause, paused_by_user=paused_by_user)
        paused = time.perf_counter()
        try:
            await load()
            new = UpdateWeightVersionReqInput(new_version=version, abort_all_requests=False)
            await self.manager.update_weight_version(new)
        except BaseException as error:
            if self.broken is not None or not isinstance(error, NothingLoaded):
                self.broken = f"the update to version {version} failed, {error!s:.500}"
            elif not paused_by_user:
                await self._go_on()
            raise WeightsRefused(self.broken or str(error), status=500) from error
        self.broken = None
        if not paused_by_user:
            await self._go_on()
        return {"pause": paused - started, "load": time.perf_counter() - paused}

    async def _stand_still(self, pause: Pause, *, paused_by_user: bool) -> None:
        """Pause, and flush the cache, which nothing fills before the engine goes on."""
        from sglang.srt.managers.io_struct import PauseGenerationReqInput

        # SGLang's own mode "abort" waits until every client has read the end of its answer. What is
        # retracted waits in a paused engine, and can be ended there.
        mode = "retract" if pause == "abort" else pause
        deadline = time.monotonic() + BUSY_SECONDS
        wait = 0.1
        while True:
            await self.manager.pause_generation(PauseGenerationReqInput(mode=mode))
            if pause == "abort":
                self.manager.abort_request(abort_all=True)
            flushed = await self.manager.flush_cache()
            if flushed.success or pause == "in_place" or self.broken is not None:
                return  # a broken update has left the cache empty
            if not paused_by_user:
                await self._go_on()
            if paused_by_user or time.monotonic() > deadline:
                raise WeightsRefused("requests keep the cache from being flushed", status=503)
            # SGLang is compiling the grammar of a request. The others go on meanwhile, and ever
            # longer, since each pause costs them what they have in the cache.
            await asyncio.sleep(wait)
            wait *= 2

    async def _go_on(self) -> None:
        from sglang.srt.managers.io_struct import ContinueGenerationReqInput

        await self.manager.continue_generation(ContinueGenerationReqInput())

    async def _load_checked(self, folder: WeightFolder, *, recapture: bool) -> None:
        """What is loaded is what was checked, or the update is a broken one."""
        if not await asyncio.to_thread(lambda: folder.unchanged):
            raise NothingLoaded("the files have changed since they were checked")
        await self._load_folder(str(folder.path), recapture=recapture)
        if not await asyncio.to_thread(lambda: folder.unchanged):
            raise RuntimeError("the files changed while they were loaded")

    async def _load_folder(self, folder: str, *, recapture: bool = False) -> None:
        from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

        manager = self.manager
        names = manager.served_model_name, manager.model_path  # SGLang makes the folder both
        request = UpdateWeightFromDiskReqInput(
            model_path=folder,
            load_format="safetensors",
            flush_cache=False,
            recapture_cuda_graph=recapture,
        )
        token = in_transaction.set(True)
        try:
            success, message, _ = await manager.update_weights_from_disk(request)
        finally:
            in_transaction.reset(token)
            manager.served_model_name, manager.model_path = names
        if not success:
            raise RuntimeError(message)


@contextmanager
def _spool() -> Iterator[Path]:
    """A folder for what comes, gone at the end. Raises WeightsRefused when it is full."""
    try:
        with tempfile.TemporaryDirectory(prefix=spool_prefix(os.getpid())) as folder:
            yield Path(folder)
    except OSError as error:
        message = f"cannot keep what comes in {tempfile.gettempdir()}: {error.strerror}"
        raise WeightsRefused(message, status=507) from error


# Set where the transaction calls SGLang, whose hooked methods then do what is SGLang's alone.
in_transaction: ContextVar[bool] = ContextVar("eadin_transaction", default=False)
_weights: Weights | None = None


def served_weights() -> Weights | None:
    """This server's; None before it is up."""
    global _weights
    from sglang.srt.entrypoints.http_server import get_global_state

    state = get_global_state()
    if _weights is None and state is not None:
        _weights = Weights(state.tokenizer_manager)
    return _weights
