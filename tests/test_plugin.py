"""The plugin notices when SGLang is not what it was written for, and says so before serving."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ead_sampler import plugin, requests
from ead_server.launch import with_defaults


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
    """Where it is not: tests/test_unsupported.py."""
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
        "from ead_sampler import device, plugin; device.choose()\n"
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


def server_args(**changes: object) -> SimpleNamespace:
    plain = {
        "speculative_algorithm": None,
        "dllm_algorithm": None,
        "disaggregation_mode": "null",
        "pp_size": 1,
        "enable_pdmux": False,
        "rl_on_policy_target": None,
        "sampling_backend": "pytorch",
    }
    return SimpleNamespace(**{**plain, **changes})


@pytest.mark.parametrize(
    ("changes", "environ", "says"),
    [
        ({"speculative_algorithm": "NGRAM"}, {}, "--speculative-algorithm"),
        ({"dllm_algorithm": "x"}, {}, "--dllm-algorithm"),
        ({"disaggregation_mode": "decode"}, {}, "--disaggregation-mode"),
        ({"pp_size": 2}, {}, "--pp-size"),
        ({"enable_pdmux": True}, {}, "--enable-pdmux"),
        ({"rl_on_policy_target": "fsdp"}, {}, "--rl-on-policy-target"),
        ({"sampling_backend": "ascend"}, {}, "--sampling-backend"),
        ({}, {"SGLANG_RETURN_ORIGINAL_LOGPROB": "1"}, "SGLANG_RETURN_ORIGINAL_LOGPROB"),
    ],
)
def test_modes_that_cannot_honour_a_schedule_are_named(
    changes: dict[str, object], environ: dict[str, str], says: str
) -> None:
    assert requests.unsupported_mode(server_args(), {}) is None
    assert says in (requests.unsupported_mode(server_args(**changes), environ) or "")


def test_sglang_still_has_the_modes_that_are_refused() -> None:
    from sglang.srt.server_args import ServerArgs

    known = {
        field for klass in ServerArgs.__mro__ for field in getattr(klass, "__annotations__", ())
    }
    assert set(vars(server_args())) <= known


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
    monkeypatch.setattr("ead_server.models.resolve", lambda name: f"/cache/{name}")
    arguments = with_defaults(given, cpu=False)
    assert "/cache/smollm2" in " ".join(arguments)
    assert arguments[arguments.index("--served-model-name") + 1] == "smollm2"


def test_a_model_flag_without_a_value_is_an_error() -> None:
    with pytest.raises(SystemExit, match="--model-path needs a value"):
        with_defaults(["--model-path"], cpu=True)
