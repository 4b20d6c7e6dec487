"""Every benchmark starts, says what it measures, and can say it to a script."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers.paths import ROOT

FOLDER = ROOT / "benchmarks"
NAMES = sorted(
    path.stem for path in FOLDER.glob("*.py") if "def main()" in path.read_text(encoding="utf-8")
)


def test_there_are_benchmarks() -> None:
    assert {"sampler", "decode", "http", "logprob", "weights", "loop", "learn"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_measures(name: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--help"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parent)
    assert found.returncode == 0, found.stderr
    assert "--json" in found.stdout
