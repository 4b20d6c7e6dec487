"""The `ead` command as a user types it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.paths import ROOT
from helpers.serving import expected_temperatures
from helpers.waiting import wait_for
from safetensors.numpy import load_file

from ead_client import Client, Rollout
from ead_server import plugin
from ead_server.errors import ServerFailed
from ead_server.launch.process import ServerProcess, hold_port


def ead(
    *arguments: str, cwd: Path | None = None, said: str = "", **environ: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ead_cli.main", *arguments]
    environ = {**os.environ, "COLUMNS": "100", **environ}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, input=said, env=environ, timeout=300
    )


COMMANDS = [
    *("serve", "demo", "train", "eval", "plot", "schedule", "chat", "rollout", "bench", "doctor"),
    *("models list", "models pull"),
]


def example_of(command: str) -> list[str]:
    """The arguments of the example in a command's help."""
    result = ead(*command.split(), "--help", COLUMNS="200")
    assert result.returncode == 0
    (example,) = re.findall(r"Example: ead (.*?)\s*[│\n]", result.stdout)
    assert example.startswith(command)
    return shlex.split(example)


def test_every_command_is_told() -> None:
    told = ead("--help").stdout + ead("models", "--help").stdout
    for command in COMMANDS:
        assert re.search(rf"│ {command.split()[-1]} ", told), command


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str) -> None:
    assert example_of(command)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("schedule", "paper, step 400"),
        ("chat", "tokens, temperature"),
        ("rollout", "2 of 2 prompts in answers.jsonl"),
        ("bench", '"ratios"'),
        ("doctor", '"ok": true'),
        ("models list", '"smollm2"'),
        ("models pull", "SmolLM2-135M-Instruct"),
        ("plot", "curves.png"),
        # each with a server of its own, on SmolLM2
        ("demo", "annealing.png"),
        ("train", "curves: "),
        ("eval", '"estimates"'),
    ],
)
def test_the_example_runs(command: str, says: str, server: ServerProcess, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("2+3?\n\n2*3?\n")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    if command == "plot":
        run = tmp_path / "runs" / "products"
        run.mkdir(parents=True)
        entries = [{"step": step, "reward/mean": 0.1 * step, "time/step": 1.0} for step in range(3)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    result = ead(*example_of(command), cwd=tmp_path, EAD_URL=server.url)
    assert result.returncode == 0, result.stderr
    assert says in result.stdout
    assert "Traceback" not in result.stderr


def test_the_example_of_serve_answers(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "ead_cli.main", *example_of("serve"))
    log = tmp_path / "server.log"
    with ServerProcess([], log, command=command) as server:
        server.wait_until_ready()
        with Client(server.url) as client:
            assert client.complete("2+3=", annealing={}, max_tokens=4).choices[0].text
        wait_for(lambda: f"ready at {server.url} (no key is needed)" in log.read_text())


def test_the_shell_completes_commands_and_flags() -> None:
    def completed(*words: str) -> list[str]:
        asked = {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
        command = [Path(sys.executable).parent / "ead"]
        environ = {**os.environ, "_EAD_COMPLETE": "complete_bash", **asked}
        return subprocess.run(command, capture_output=True, text=True, env=environ).stdout.split()

    assert completed("ead", "sch") == ["schedule"]
    assert completed("ead", "models", "p") == ["pull"]
    assert completed("ead", "chat", "--ann") == ["--annealing"]


@pytest.mark.parametrize("asked", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}])
def test_processes_that_share_the_cores_do_not_spin_unless_told(asked: dict[str, str]) -> None:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environ = {name: value for name, value in os.environ.items() if name not in names} | asked
    code = f"import json, os, ead_server; print(json.dumps([os.environ.get(n) for n in {names}]))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)
    want = asked or {"GOMP_SPINCOUNT": "10000"}
    assert json.loads(told.stdout) == [want.get(name) for name in names]


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
        (["schedule", "hot"], "annealing: must be JSON or one of recipe, paper, ead,"),
        (["schedule", '{"tau_max": 99}'], "annealing.tau_max: must be a finite number"),
        (["schedule", "paper", "--out", "x.gif"], "--out: must end in .png or .svg, got x.gif"),
        (["chat", "hi", "--by", "luck"], "--by: must be one of temperature, entropy, surprise"),
        (["chat", "hi", "--url", "http://127.0.0.1:9"], "ConnectError"),
        (["rollout", "/no/such/file"], "cannot read /no/such/file"),
        (["rollout", "x", "--sampling", "[]"], "--sampling: must be an object, got []"),
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
        "from ead_sampler.in_scheduler import rows, sampling\n"
        "from ead_server import plugin\n"
        f"{broken}\n"
        "from ead_cli.main import app; app(['doctor', '--json'])"
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
    code = "import sys; sys.modules['typer'] = None; import ead_cli.main"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "pip install 'ead[server]'" in result.stderr
    assert "Traceback" not in result.stderr


# --- schedule ----------------------------------------------------------------------------------


def test_a_schedule_is_shown_in_every_form(tmp_path: Path) -> None:
    recipe = {"decay": 100.0, "warmup": 3}
    numbers = ead("schedule", json.dumps(recipe), "cosine", "--length", "40", "--json")
    shown = json.loads(numbers.stdout)["temperatures"]
    assert [*shown] == [json.dumps(recipe), "cosine"]
    # the formula alone: 64-bit arithmetic, not ours
    assert np.allclose(shown[json.dumps(recipe)], expected_temperatures(recipe, 40), atol=1e-6)
    table = ead("schedule", "paper", "--length", "40").stdout
    assert re.search(r"│ 10 +│ 0\.708 │", table)
    for name, begins in (("s.png", b"\x89PNG"), ("s.svg", b"<svg")):
        assert ead("schedule", "paper", "--out", name, cwd=tmp_path).stdout == f"{name}\n"
        assert (tmp_path / name).read_bytes().startswith(begins)


@pytest.mark.parametrize("no_color", [False, True])
def test_on_a_terminal_a_schedule_is_a_plot(no_color: bool) -> None:
    command = f"stty cols 80 rows 24; {sys.executable} -m ead_cli.main schedule paper cosine"
    environ = {"TERM": "xterm-256color", **os.environ}
    environ.pop("NO_COLOR", None)
    if no_color:
        environ["NO_COLOR"] = "1"
    told = subprocess.run(
        ["script", "-qec", command, "/dev/null"], capture_output=True, text=True, env=environ
    )
    assert "generated token" in told.stdout, told.stdout + told.stderr
    assert "cosine" in told.stdout
    assert ("\x1b[" in told.stdout) != no_color


# --- chat --------------------------------------------------------------------------------------


def test_a_chat_remembers_and_stays_plain_off_a_terminal(server: ServerProcess) -> None:
    chat = ("chat", "--url", server.url, "--max-tokens", "6")
    twice = ead(*chat, said="hello\nagain\n")
    assert twice.returncode == 0, twice.stderr
    assert len(re.findall(r"\d+ tokens?, temperature 1.00 to", twice.stdout)) == 2
    assert "\x1b" not in twice.stdout
    for by in ("entropy", "surprise"):
        assert ead(*chat, "hi", "--by", by, "--annealing", "cosine").returncode == 0


# --- rollout -----------------------------------------------------------------------------------


def test_rollouts_go_on_where_they_were_stopped(server: ServerProcess, tmp_path: Path) -> None:
    schedule = {"tau_max": 1.5, "tau_min": 0.3, "decay": 20.0, "warmup": 3, "step": 0}
    prompts = [
        "2+3?",
        [5, 6, 7],
        [{"role": "user", "content": "hi"}],
        {"prompt": "x", "n": 1, "answer": 7, "metadata": {"from": "here"}},
        {"text": "too long " * 20_000},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    asked = ["rollout", "p.jsonl", "-n", "2", "--annealing", json.dumps(schedule), "--json"]
    asked += ["--max-new-tokens", "12", "--sampling", '{"ignore_eos": true}', "--per-call", "2"]
    lines = tmp_path / "out.jsonl"

    def run(*more: str) -> tuple[int, Any, str]:
        result = ead(*asked, *more, cwd=tmp_path, EAD_URL=server.url)
        assert "Traceback" not in result.stderr
        return result.returncode, json.loads(result.stdout or "null"), result.stderr

    counts = {"prompts": 5, "answered_before": 0, "failed": 1}
    status, told, said = run("--out", "out.jsonl")
    assert (status, told) == (1, {**counts, "out": "out.jsonl"}), said
    assert "prompt 4: " in said
    first = [json.loads(line) for line in lines.read_text().splitlines()]
    assert sorted(entry["index"] for entry in first) == [0, 1, 2, 3]
    by_index = {entry["index"]: entry for entry in first}
    assert by_index[1]["prompt_token_ids"] == [5, 6, 7]
    assert by_index[3]["metadata"] == {"answer": 7, "from": "here"}
    for entry in first:
        assert len(entry["answers"]) == (1 if entry["index"] == 3 else 2)
        for answer in entry["answers"]:
            rollout = Rollout.model_validate(answer["rollout"])
            want = expected_temperatures(schedule, 12)
            assert np.abs(rollout.temperatures - want).max() < 1e-6

    lines.write_text("".join(json.dumps(entry) + "\n" for entry in first[:2]) + '{"index": 3, "me')
    status, told, _ = run("--out", "out.jsonl")  # it was killed while it wrote
    assert told == {**counts, "answered_before": 2, "out": "out.jsonl"}
    again = [json.loads(line) for line in lines.read_text().splitlines()]
    assert again[:2] == first[:2]
    assert sorted(entry["index"] for entry in again) == [0, 1, 2, 3]

    status, _, said = run("--out", "out.jsonl", "-n", "3")
    assert status == 1
    assert "out.jsonl has answers with another n: 2, not 3" in said

    status, told, _ = run("--out", "packed")
    assert told == {**counts, "out": "packed"}
    files = sorted((tmp_path / "packed").iterdir())
    assert [file.name for file in files] == [f"{i:06d}.safetensors" for i in range(4)]
    arrays = load_file(files[0])
    assert arrays["offsets"].tolist() == [0, 12, 24]
    files[2].unlink()
    assert run("--out", "packed")[1]["answered_before"] == 3
    assert files[2].exists()


def test_a_line_that_is_no_prompt_is_named(tmp_path: Path) -> None:
    for line, says in (("{", "p.jsonl:2: "), ("7", "p.jsonl:2: must be a text, a list or an")):
        (tmp_path / "p.jsonl").write_text(f'"fine"\n{line}\n')
        result = ead("rollout", "p.jsonl", cwd=tmp_path)
        assert result.returncode == 1
        assert says in result.stderr
