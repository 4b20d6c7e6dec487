"""The examples of examples/clients, run as printed, each by the client that it is for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TINY_FLAGS
from test_server import expected_temperatures

from ead_server.process import ServerProcess

EXAMPLES = sorted(
    path
    for path in (Path(__file__).parent.parent / "examples" / "clients").iterdir()
    if path.suffix in (".py", ".sh")
)


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """White space between JSON's tokens is left out: once cool, a random model, which has no reason
    to stop, goes on with it (6 of 256 answers were longer than 1,000 tokens)."""
    flags = (
        "--model-path",
        str(tiny_model),
        *TINY_FLAGS,
        "--constrained-json-disable-any-whitespace",
    )
    log = tmp_path_factory.mktemp("other-clients") / "server.log"
    with ServerProcess(flags, log) as process:
        process.wait_until_ready()
        yield process


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_prints_every_tokens_temperature(
    example: Path, server: ServerProcess, tmp_path: Path
) -> None:
    program = Path(sys.prefix) / "clients" / "bin" / "python"  # made by `make test`
    if example.suffix == ".sh":
        if not shutil.which("curl"):
            pytest.skip("needs curl")
        program = Path("/bin/sh")
    environ = {
        **os.environ,
        "OPENAI_BASE_URL": f"{server.url}/v1",
        "OPENAI_API_KEY": "none",
        "LLM_USER_PATH": str(tmp_path),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # it would fetch it
    }
    ran = subprocess.run(
        [program, example], capture_output=True, text=True, cwd=tmp_path, env=environ, timeout=120
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    lines = [line.split() for line in ran.stdout.splitlines() if not line.startswith("#")]
    told = [(float(tau), float(logprob)) for tau, logprob, *_ in lines]
    begins = [index for index, (tau, _) in enumerate(told) if tau == 1.2]
    assert begins[0] == 0
    assert len(begins) == (2 if example.stem == "openai_async" else 1)
    for begin, end in zip(begins, [*begins[1:], len(told)], strict=True):
        want = expected_temperatures({"preset": "paper", "warmup": 0, "step": 0}, end - begin)
        assert [tau for tau, _ in told[begin:end]] == pytest.approx(want, abs=1e-6)
    assert all(logprob <= 0 for _, logprob in told)
