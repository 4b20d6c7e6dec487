"""The `ead` command as a user types it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ead_sampler import plugin
from ead_server.process import ServerFailed, hold_port


def ead(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ead_server.cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "100", **environ}
    )


@pytest.mark.parametrize(
    "command", [[], ["serve"], ["demo"], ["doctor"], ["models"], ["models", "pull"]]
)
def test_help_exists_and_shows_an_example(command: list[str]) -> None:
    result = ead(*command, "--help")
    assert result.returncode == 0
    if command not in ([], ["models"]):
        assert f"Example: ead {' '.join(command)}" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["models", "pull", "other"], "no embedded model 'other'; there is: smollm2"),
        (["serve", "--model-path"], "--model-path needs a value"),
        (["serve", "--annealing", "{'a'"], "annealing: is not valid JSON"),
        (["serve", '--annealing={"tau_max": 99}'], "annealing.tau_max: must be a finite number"),
        (["serve", "--enable-custom-logit-processor"], "unpickles code that clients send"),
        (["serve", "--max-body-bytes", "1"], "--max-body-bytes: Input should be greater than"),
        (["serve", "--log-format", "xml"], "--log-format: Input should be 'text', 'json' or 'off'"),
        (["serve", "--api-key-file", "/no/such/file"], "cannot read /no/such/file: No such file"),
    ],
)
def test_mistakes_are_a_sentence_and_a_status(arguments: list[str], says: str) -> None:
    result = ead(*arguments)
    assert result.returncode == 1
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_the_doctor_finds_this_machine_well() -> None:
    result = ead("doctor", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["ok"]
    says = {finding["what"]: finding["says"] for finding in report["findings"]}
    assert says["hooks"] == f"{len(plugin.HOOKS)} in place"
    assert says["self-test"].startswith("sampled as told")


@pytest.mark.parametrize(
    ("broken", "what", "says"),
    [
        # each in the doctor's own process, before it looks
        (
            "plugin.SUPPORTED_SGLANG = '0.0.1'",
            "SGLang",
            "this version of ead supports sglang 0.0.1",
        ),
        ("os.environ['EAD_ANNEALING'] = '[]'", "default schedule", "must be an object"),
        (
            "rows.AnnealedRows.temperatures = lambda self, positions, fixed, entropies: fixed",
            "self-test",
            "tokens at temperature 2.000 do not fit it",
        ),
        (
            "old = sampling._sampled_values\nsampling._sampled_values = lambda *a: old(*a) + 1e-4",
            "self-test",
            "are off by 1.0e-04",
        ),
    ],
)
def test_the_doctor_finds_what_is_wrong(broken: str, what: str, says: str) -> None:
    code = (
        "import os; from ead_sampler import device; device.choose()\n"
        "from ead_sampler import plugin, rows, sampling\n"
        f"{broken}\n"
        "from ead_server.cli import app; app(['doctor', '--json'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    wrong = [f for f in json.loads(result.stdout)["findings"] if not f["right"]]
    assert [finding["what"] for finding in wrong] == [what]
    assert says in wrong[0]["says"]


def test_a_taken_port_is_a_sentence_before_any_model_is_loaded(tiny_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for command in (["serve", "--model-path", str(tiny_model)], ["demo"]):
            result = ead(*command, "--port", port)
            assert result.returncode == 1
            assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in result.stderr
            assert "Traceback" not in result.stderr
            assert "Load weight begin" not in result.stderr


def test_a_default_schedule_that_the_server_could_not_honour_stops_it(tiny_model: Path) -> None:
    arguments = ["serve", "--model-path", str(tiny_model), "--annealing", "{}"]
    result = ead(*arguments, SGLANG_RETURN_ORIGINAL_LOGPROB="1")
    assert result.returncode == 1
    assert "cannot honour a default schedule: SGLANG_RETURN_ORIGINAL_LOGPROB" in result.stderr
    assert "Load weight begin" not in result.stderr


def test_a_held_port_goes_to_nobody_but_a_server_that_names_it() -> None:
    """Also while connections and other servers come and go (it failed a CI run once)."""
    held = hold_port("127.0.0.1")
    port = held.getsockname()[1]
    for _ in range(100):  # a port that is not held comes up 5 times on average
        with contextlib.ExitStack() as sockets:
            for _ in range(900):
                other = sockets.enter_context(socket.socket())
                other.bind(("127.0.0.1", 0))
                assert other.getsockname()[1] != port
    with socket.create_server(("127.0.0.1", port)), pytest.raises(ServerFailed):
        hold_port("127.0.0.1", port)
    held.close()


def test_a_cache_that_cannot_be_used_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = ead("models", "pull", EAD_CACHE=str(tmp_path / "file"))
    assert result.returncode == 1
    assert "EAD_CACHE names another folder" in result.stderr
    assert "Traceback" not in result.stderr


def test_without_its_extras_the_command_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None; import ead_server.cli"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "pip install 'ead[server]'" in result.stderr
    assert "Traceback" not in result.stderr
