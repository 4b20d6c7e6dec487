"""The examples of examples/clients, run as printed, each by the client that it is for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_server import expected_temperatures

from ead_server.process import ServerProcess

EXAMPLES = sorted(
    path
    for path in (Path(__file__).parent.parent / "examples" / "clients").iterdir()
    if path.suffix in (".py", ".sh")
)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_prints_every_tokens_temperature(
    example: Path, server: ServerProcess, tmp_path: Path
) -> None:
    program = Path(sys.prefix) / "clients" / "bin" / "python"  # made by `make venv`
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
