"""The documentation builds, its links hold, and its Python runs as printed, but for the address."""

from __future__ import annotations

import re
import subprocess

import pytest
from helpers.paths import ROOT

from ead_sampler.schedules import REGISTRY
from ead_server.launch.process import ServerProcess

PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_what_is_printed_runs(
    block: str, server: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = dict(REGISTRY)
    try:
        exec(
            compile(
                block.replace("http://127.0.0.1:30000", server.url),
                "docs",
                "exec",
                dont_inherit=True,
            ),
            {},
        )
    finally:
        REGISTRY.clear()
        REGISTRY.update(kinds)
    assert capsys.readouterr().out.strip()


def test_the_documentation_builds_without_a_warning() -> None:
    built = subprocess.run(["make", "docs"], cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    for page in PAGES:
        assert page.stem in (ROOT / "mkdocs.yml").read_text()
    reference = (ROOT / "site" / "reference" / "index.html").read_text()
    for name in ("stream_rollouts", "two_stage", "correction_weights", "policy_loss"):
        assert name in reference
