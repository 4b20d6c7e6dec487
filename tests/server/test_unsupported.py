"""An SGLang that ead cannot extend, in an environment that has the light client: it starts as it
is, with one loud warning, unless somebody asked for annealing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from helpers.reference import TINY_FLAGS

from ead_server.launch.process import ServerProcess
from ead_server.launch.serve import with_defaults

LOAD = """
import os
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
before = dict(os.environ)
load_plugins()
print("hooks", len(HookRegistry._hooks))
print("changed", sorted(set(os.environ.items()) ^ set(before.items())))
from ead_server.plugin import load
load()  # as another process of the same server does
"""
NONE_HOOKED = ["hooks 0", "changed [('EAD_TOLD_UNEXTENDED', '1')]"]


@pytest.fixture
def other_version(tmp_path: Path) -> dict[str, str]:
    """An environment in which SGLang says that it is another one."""
    info = tmp_path / "sglang-0.6.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.6.0\n")
    paths = (str(tmp_path), os.environ.get("PYTHONPATH", ""))
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def loaded(environ: dict[str, str], code: str = LOAD) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environ},
        timeout=300,
    )


def warnings(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("ead: WARNING: SGLang starts")]


def test_another_version_starts_unextended_and_says_so_once(other_version: dict[str, str]) -> None:
    run = loaded(other_version)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == NONE_HOOKED
    (warning,) = warnings(run.stderr)
    assert "found sglang 0.6.0; this version of ead supports sglang 0.5.23" in warning
    assert "`annealing`" in warning


def test_the_rust_server_starts_unextended() -> None:
    run = loaded({"SGLANG_RUST_SERVER": "1"})
    assert run.stdout.splitlines() == NONE_HOOKED, run.stderr
    assert len(warnings(run.stderr)) == 1


@pytest.mark.parametrize(
    "environ",
    [
        {"EAD_REQUIRE": "1"},
        {"EAD_SETTINGS": "{}"},  # as of `ead serve`
        {"EAD_ANNEALING": '{"preset": "paper"}'},
    ],
    ids=lambda environ: next(iter(environ)),
)
def test_where_annealing_was_asked_for_it_is_refused(
    environ: dict[str, str], other_version: dict[str, str]
) -> None:
    run = loaded({**other_version, **environ})
    assert run.returncode == 1
    assert "ead cannot extend this SGLang:\n  found sglang 0.6.0" in run.stderr
    assert run.stdout == ""


@pytest.mark.parametrize("missing", ["torch", "orjson"])
def test_where_only_the_light_client_is_installed_the_entry_point_does_not_fail(
    missing: str,
) -> None:
    code = f"""
import sys
sys.modules[{missing!r}] = None  # an ImportError for whoever asks
from ead_server.plugin import load
load()
print("sglang.srt.plugins.hook_registry" in sys.modules)
"""
    run = loaded({}, code)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["False"]
    (warning,) = warnings(run.stderr)
    assert missing in warning


def test_a_whole_server_of_another_version_serves_unextended(
    tiny_model: Path, tmp_path: Path, other_version: dict[str, str]
) -> None:
    """All of its processes load the plugin; one of them warns."""
    with ServerProcess(
        with_defaults(["--model-path", str(tiny_model), *TINY_FLAGS], cpu=True),
        tmp_path / "server.log",
        command=(sys.executable, "-m", "sglang.launch_server"),
        environ=other_version,
    ) as server:
        server.wait_until_ready()
        body = {"model": "m", "prompt": "x", "max_tokens": 3, "annealing": {"tau_max": 99}}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200  # ignored, as by any SGLang
        assert "annealing" not in answer.text
        assert httpx.get(f"{server.url}/v1/annealing", timeout=60).status_code == 404
        assert len(warnings(server.log.read_text(errors="replace"))) == 1
