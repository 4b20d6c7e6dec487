"""The plugin notices when SGLang is not what it was written for, and says so before serving."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ead_server import plugin
from ead_server.launch.serve import with_defaults


def test_the_installed_sglang_has_every_hook() -> None:
    assert plugin.check_sglang() == []


def test_a_hook_that_is_gone_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    hook = plugin.HOOKS[0]
    gone = hook._replace(target=hook.target + "_of_old")
    changed = hook._replace(parameters="self batch")
    monkeypatch.setattr(plugin, "HOOKS", (gone, changed))
    first, second = plugin.check_sglang()
    assert gone.target in first
    assert gone.why in first
    assert f"{hook.target} takes (self batch vocab_size), expected (self batch)" in second


def test_another_version_is_refused_before_anything_is_touched_where_ead_is_required(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where it is not: tests/server/test_unsupported.py."""
    monkeypatch.setenv("EAD_REQUIRE", "1")
    monkeypatch.setattr(plugin, "version", lambda name: "0.6.0")
    assert plugin.check_sglang() == [
        "found sglang 0.6.0; this version of ead supports sglang 0.5.23"
    ]
    with pytest.raises(SystemExit, match=r"ead cannot extend this SGLang:\n  found sglang 0.6.0"):
        plugin.load()


def test_the_rust_server_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
    assert "unset it" in plugin.check_sglang()[0]


def test_hooks_that_sglang_did_not_apply_are_found(tmp_path: Path) -> None:
    """In a process of its own: before SGLang loads plugins none is in place, afterwards all are."""
    code = (
        "from ead_sampler import device; from ead_server import plugin; device.choose()\n"
        "print(len(plugin.hooks_not_in_place()))\n"
        "from sglang.srt.plugins import load_plugins; load_plugins()\n"
        "print(len(plugin.hooks_not_in_place()), len(plugin.HOOKS))\n"
        "import sglang.srt.entrypoints.http_server as http\n"
        "print([m.cls.__name__ for m in http.app.user_middleware].count('AnnealingMiddleware'))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    before, after, middlewares = run.stdout.strip().splitlines()[-3:]
    assert int(before) == len(plugin.HOOKS)
    assert after == f"0 {len(plugin.HOOKS)}"
    assert middlewares == "1"


DRAFT = "--speculative-draft-model-path MODEL"
# a real command line each, as SGLang itself reads it; and what the refusal names
UNSUPPORTED = {
    **{
        f"--speculative-algorithm {name} {DRAFT}": "--speculative-algorithm"
        for name in ("DFLASH", "EAGLE", "EAGLE3", "FROZEN_KV_MTP", "NEXTN", "STANDALONE")
    },
    "--speculative-algorithm NGRAM": "--speculative-algorithm",
    "--dllm-algorithm LowConfidence": "--dllm-algorithm",
    "--disaggregation-mode prefill": "--disaggregation-mode",
    "--disaggregation-mode decode": "--disaggregation-mode",
    "--pp-size 2": "--pp-size",
    "--pipeline-parallel-size 2": "--pp-size",
    "--enable-pdmux": "--enable-pdmux",
    "--rl-on-policy-target fsdp": "--rl-on-policy-target",
    "--sampling-backend ascend": "--sampling-backend",
    "SGLANG_RETURN_ORIGINAL_LOGPROB=1": "SGLANG_RETURN_ORIGINAL_LOGPROB",
}
SUPPORTED = ["", "--sampling-backend flashinfer", "--sampling-backend pytorch", "--tp 2 --dp 2"]

ASK = """
import json, os, sys
from ead_sampler import device; device.choose()
from sglang.srt.plugins import load_plugins; load_plugins()
from sglang.srt.runtime_context import get_context
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import prepare_server_args
model, *lines = sys.argv[1:]
plain = ["--model-path", model, "--attention-backend", "torch_native"]
for line in lines:
    words = line.replace("MODEL", model).split()
    environ = dict(word.split("=") for word in words if not word.startswith("-") and "=" in word)
    os.environ.update(environ)
    flags = [word for word in words if word.partition("=")[0] not in environ]
    try:
        args = prepare_server_args([*plain, *flags])
    except Exception as error:
        print("OUT", json.dumps(f"{type(error)} {error}"))
        continue
    get_context().set_server_args(args)
    said = []
    for custom in ({"annealing": {}}, {"rollout": True}, {}):
        try:
            SamplingParams(custom_params=custom).verify(1000)
            said.append(None)
        except ValueError as error:
            said.append(str(error))
    print("OUT", json.dumps(said))
    for name in environ:
        del os.environ[name]
"""


@pytest.fixture(scope="module")
def told(tiny_model: Path) -> dict[str, list[str | None]]:
    """What a request with a schedule, one for the arrays, and one for neither are told, by flags.

    In one process with SGLang's own reading of each command line and the hook in its place.
    """
    lines = [*SUPPORTED, *UNSUPPORTED]
    run = subprocess.run(
        [sys.executable, "-c", ASK, str(tiny_model), *lines], capture_output=True, text=True
    )
    outputs = [json.loads(x[4:]) for x in run.stdout.splitlines() if x.startswith("OUT ")]
    assert len(outputs) == len(lines), run.stderr
    return dict(zip(lines, outputs, strict=True))


@pytest.mark.parametrize("flags", UNSUPPORTED)
def test_modes_that_cannot_honour_a_schedule_are_named(
    told: dict[str, list[str | None]], flags: str
) -> None:
    annealed, recorded, plain = told[flags]
    assert UNSUPPORTED[flags] in (annealed or "")
    assert UNSUPPORTED[flags] in (recorded or "")
    assert plain is None


@pytest.mark.parametrize("flags", SUPPORTED)
def test_other_modes_are_not_refused(told: dict[str, list[str | None]], flags: str) -> None:
    assert told[flags] == [None] * 3


# --- ead serve -----------------------------------------------------------------------------------


def test_every_flag_passes_and_a_users_own_flag_wins(tmp_path: Path) -> None:
    given = ["--model-path", str(tmp_path), "--port", "1", "--mem-fraction-static=0.7"]
    arguments = with_defaults(given, cpu=True)
    assert arguments[: len(given)] == given
    assert "--mem-fraction-static" not in arguments
    assert arguments[arguments.index("--attention-backend") + 1] == "torch_native"
    with_metrics = [*given, "--enable-metrics", "--log-level-http", "warning"]
    assert with_defaults(given, cpu=False) == with_metrics


@pytest.mark.parametrize("given", [[], ["--model-path", "smollm2"], ["--model=smollm2"]])
def test_the_embedded_model_is_resolved_and_keeps_its_name(
    given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ead_server.launch.models.resolve", lambda name: f"/cache/{name}")
    arguments = with_defaults(given, cpu=False)
    assert "/cache/smollm2" in " ".join(arguments)
    assert arguments[arguments.index("--served-model-name") + 1] == "smollm2"


def test_a_model_flag_without_a_value_is_an_error() -> None:
    with pytest.raises(SystemExit, match="--model-path needs a value"):
        with_defaults(["--model-path"], cpu=True)
