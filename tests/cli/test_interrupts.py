"""Ctrl-C in a terminal, for the commands that keep no checkpoint. No server of SGLang."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROLLOUTS = "/v1/rollouts"


class Silent(BaseHTTPRequestHandler):
    """Is ready, and never answers a question."""

    asked = threading.Event()
    ended = threading.Event()

    def do_GET(self) -> None:
        body = b'{"status": "ready", "model_path": "m", "weight_version": "1"}'
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.asked.set()
        self.ended.wait()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def silent() -> Iterator[str]:
    Silent.asked.clear()
    Silent.ended.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Silent) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        Silent.ended.set()
        server.shutdown()


def in_a_terminal(command: list[str], cwd: Path) -> tuple[subprocess.Popen[bytes], int]:
    """A process whose terminal is the other end of the file descriptor."""
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        command,
        cwd=cwd,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    return process, ours


def read(terminal: int, until: bytes | None = None) -> str:
    """What is printed, up to its end or to a text."""
    said = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while until is None or until not in said:
            said += os.read(terminal, 65536)
    return said.decode()


DEMO = """
import threading, ead_cli.demo, ead_cli.main
def pull():
    print("pulling", flush=True)
    threading.Event().wait()
ead_cli.demo.models.pull = pull
ead_cli.main.main()
"""


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("eval", "ead: stopped by Ctrl-C; nothing is kept of this evaluation"),
        (
            "rollout",
            "ead: stopped by Ctrl-C; what was answered is in out.jsonl, and the same command again "
            "goes on from there",
        ),
        ("demo", "ead: stopped by Ctrl-C; its server is stopped"),
        ("bench", "ead: stopped by Ctrl-C"),
    ],
)
def test_ctrl_c_is_a_line_and_status_130(
    command: str, says: str, silent: str, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("one\n")
    arguments = {
        "eval": ["-m", "ead_cli.main", "eval", f"server.url={silent}", "evaluation.problems=2"],
        "rollout": [
            *("-m", "ead_cli.main", "rollout", "prompts.txt", "--url", silent),
            *("--out", "out.jsonl"),
        ],
        "demo": ["-c", DEMO, "demo"],
        "bench": ["-m", "ead_cli.main", "bench", "--batch", "2", "--url", silent],
    }[command]
    process, terminal = in_a_terminal([sys.executable, *arguments], tmp_path)
    try:
        if command == "demo":
            read(terminal, b"pulling")
        else:
            assert Silent.asked.wait(120)
        os.write(terminal, b"\x03")
        said = read(terminal)
        process.wait(60)
    finally:
        process.kill()
        os.close(terminal)
    assert process.returncode == 130, said
    assert says in " ".join(said.split()), said
    assert "Traceback" not in said
