"""The README's Python runs as printed, but for the server's address."""

from __future__ import annotations

import re

import pytest
from helpers.paths import ROOT

from ead_server.launch.process import ServerProcess

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_it_is_short_and_has_something_to_run() -> None:
    assert len(BLOCKS) == 2
    assert len(README.split()) <= 700


@pytest.mark.parametrize("block", BLOCKS)
def test_the_readme_runs(
    block: str, server: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(
        compile(
            block.replace("http://127.0.0.1:30000", server.url),
            "README.md",
            "exec",
            dont_inherit=True,
        ),
        {},
    )
    # the temperature of the first token, as Python (1.0) or numpy (1.) prints it
    printed = capsys.readouterr().out
    assert re.search(r"(?<![-.\d])1\.0*[\s\],]", printed)
    if printed.count("\n") > 3:  # a random model may end its answer before it falls
        assert re.search(r"(?<![-.\d])0\.[1-9]", printed)


def test_make_targets_that_the_readme_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
